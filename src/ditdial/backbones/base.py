"""The contract: what we must know of a diffusers model class to make it elastic.

A backbone is knowledge, not a model: which submodules make tokens and turn them back, what the
call's arguments mean, where the layers are that a method adapts. Most of it is class attributes,
and three small objects hold what belongs together: `Patches`, `Arguments`, `Times`. The methods
have defaults that fit most classes. One file each.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ditdial.backbones.arguments import Arguments, Call
from ditdial.backbones.blocks import BlockList
from ditdial.backbones.forward import Embed, Forward, Project
from ditdial.backbones.layers import Layers, Packed, named
from ditdial.backbones.patches import Patches
from ditdial.backbones.routed import Routed, RoutedBlock
from ditdial.backbones.sizes import Sizes, fitting
from ditdial.backbones.streamed import Streamed
from ditdial.backbones.times import Times
from ditdial.cost.blocks import Block, Term
from ditdial.cost.linears import matrix_sizes
from ditdial.cost.shape import PatchCost, TransformerShape
from ditdial.ops.patching import Triple, coarse_grid, group_means
from ditdial.plan.mode import Mode

Model = Any
"""A live diffusers model or submodule; `nn.Module` as a type would hide its attributes."""


BlockHook = Callable[[nn.Module, tuple, dict[str, Any]], tuple[tuple, dict[str, Any]] | None]
"""``hook(module, args, kwargs)`` as `torch.nn.Module.register_forward_pre_hook` takes it."""

Rewired = Callable[..., Any]
"""``method(model, forward, stock, *args)`` in place of ``stock(*args)``, a method of the model."""

WIDEST_TURN = 3
"""Base patches along which the fastest rotary phases, of 1 per patch, turn by less than pi."""

COMMON_FACTS = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "patch_size",
    "in_channels",
    "out_channels",
)
"""Entries that most configs have and an adapter must share with its base."""


class Backbone(ABC):
    """Knowledge of one diffusers model class.

    Attributes:
        model_class: name of the diffusers class.
        patches: where it makes tokens of patches and patches of tokens.
        arguments: what the arguments of its calls mean.
        times: how it is told the time.
        sizes: how its calls are made for pictures of another size.
        rotary: submodule that makes the rotary phases of image tokens, if their grid is the only
            thing it depends on.
        rewired: methods of the model and what replaces them in modes that make their own tokens,
            where no submodule makes patches or positions.
        facts: entries of the config that an adapter must share with its base.
        direction: 1 if the model predicts as its scheduler expects, -1 if the pipeline negates it.
        axes: latent axes that coarse patches may cover: ``hw``, or ``thw`` for video.
        low_rank: layers of self-attention and feed-forward by block list.
        adapts: which of them a method adapts: a regular expression that their names match.
        conditioning: modules that make the conditioning vector ``(B, D)`` of modulation.
        sinusoids: modules that embed one and the same time, block after block.
        prompt_only: layers that see nothing but the prompt, by block list.
        reads_blocks: the stock forward looks into its blocks or counts them, beside calling them.
        corners: coarse tokens can have the positions of their groups' first tokens.
        block_lists: which tokens go through the layers of its blocks; those that are routed or
            streamed come first, in the order they have there.
        shape_class: what its cost depends on.
        streamed: where tokens meet in its blocks, if sparse modes are known to work.
        packed: what branches of different modes in one packed call ask of its modules; None where
            they cannot share one.
        routed: layers that heads, channels and tokens go through, for each list of blocks.
    """

    model_class: str
    patches: Patches
    arguments: Arguments = Arguments()
    times: Times = Times()
    sizes: Sizes = Sizes()
    rotary: str | None = None
    rewired: tuple[tuple[str, Rewired], ...] = ()
    facts: tuple[str, ...] = ()
    direction: float = 1.0
    axes: str = "hw"
    low_rank: Layers = ()
    adapts: str = ""
    conditioning: tuple[str, ...] = ()
    sinusoids: tuple[str, ...] = ()
    prompt_only: Layers = ()
    reads_blocks: bool = False
    corners: bool = False
    block_lists: tuple[BlockList, ...]
    shape_class: type[TransformerShape] = TransformerShape
    streamed: Streamed | None = None
    packed: Packed | None = None
    routed: tuple[Routed, ...] = ()

    def routed_blocks(self, model: Model) -> Iterator[RoutedBlock]:
        """The modules of every block that routed modes narrow, in the order they run in."""
        for blocks in self.routed:
            yield from blocks.of(model)

    def shape(self, model: Model, grid: Triple, text_tokens: int) -> TransformerShape:
        """What the model's cost depends on; may take more of what `size` returns."""
        first, last = self.patches.layers(model)
        into, width = matrix_sizes(first)
        once = sum(each.once_macs(model) for each in self.block_lists)
        return self.shape_class(
            grid=grid,
            patches=PatchCost(width=width, into=into, out=last.out_features),
            blocks=tuple(Block(terms=terms) for terms in self.block_terms(model)),
            text_tokens=text_tokens,
            picture_macs=once + self.picture_macs(model, text_tokens),
        )

    def block_terms(
        self, model: Model, adapted: Collection[str] | None = None
    ) -> tuple[tuple[Term, ...], ...]:
        """What each block multiplies (see `BlockList.terms`)."""
        routed, prompt = {each.blocks: each for each in self.routed}, dict(self.prompt_only)
        found = (
            each.terms(model, routed.get(each.blocks), prompt.get(each.blocks, ()), adapted)
            for each in self.block_lists
        )
        return tuple(itertools.chain.from_iterable(found))

    @abstractmethod
    def picture_macs(self, model: Model, text_tokens: int) -> int:
        """Multiply-adds of one picture outside the blocks whatever the mode.

        That is its conditioning and the projections of its text.
        """

    @abstractmethod
    def default_size(self, model: Model) -> tuple[Triple, int]:
        """Base grid and number of text tokens where nothing else is said.

        Plans and ``ditdial probe`` count with these: the usual size of the published model, and the
        usual length of a prompt in its pipeline.

        Returns:
            ``(frames, height, width)`` in base tokens, and text tokens.
        """

    def size(self, model: Model, call: Call) -> tuple[Any, ...]:
        """What the cost of a call depends on beside the model: base grid, text tokens."""
        return self.grid(model, call), self.text_tokens(call)

    def planned_size(
        self,
        grid: Triple,
        text_tokens: int,
        pipe: Any,
        *,
        reference_tokens: int = 0,
        token_times: bool | None = None,
    ) -> tuple[Any, ...]:
        """What `size` will return in a run of a pipeline (None for a bare model).

        Args:
            grid, text_tokens, reference_tokens: that the plan is asked for.
            pipe: tells what else the size of its calls will hold.
            token_times: whether each token has a time of its own; None as is usual.

        Raises:
            ValueError: something that the class has not.
        """
        for name, told in (("reference_tokens", reference_tokens), ("token_times", token_times)):
            if told:
                raise ValueError(f"{name} = {told} of {self.model_class}; legal: {type(told)()}")
        return grid, text_tokens

    def grid(self, model: Model, call: Call) -> Triple:
        """Base grid ``(frames, height, width)`` of a call.

        Read from the latent's sides ``(B, C, [frames,] height, width)``; classes whose pipelines
        pack latents into tokens read it elsewhere.
        """
        sides = self.arguments.latent(call).shape[2:]
        frames, height, width = sides if len(sides) == 3 else (1, *sides)
        t, h, w = self.patches.size(model)
        return frames // t, height // h, width // w

    def text_tokens(self, call: Call) -> int:
        """Text tokens of one picture."""
        text = call.get("encoder_hidden_states")
        return 0 if text is None else text.shape[1]

    def apart(self, latent: Tensor, forward: Forward) -> tuple[Tensor, Tensor | None]:
        """The picture to make, and given ones behind it in one packed sequence, if there are any.

        These keep their base tokens in every mode.
        """
        count = math.prod(forward.grid)
        if latent.ndim != 3 or latent.shape[1] == count:
            return latent, None
        return latent[:, :count], latent[:, count:]

    def vectors(self, latent: Tensor, forward: Forward) -> Tensor:
        """What the token-making module is given -> base patch vectors ``(B, T, H, W, c)``."""
        if latent.ndim == 3:  # packed by the pipeline, one vector per token
            return latent.unflatten(1, forward.grid)
        if latent.ndim == 4:
            latent = latent[:, :, None]
        return self.patches.vectors(latent, forward.patch)

    def tokens(
        self, module: Model, forward: Forward, mode: Mode, latent: Tensor, embed: Embed
    ) -> Tensor:
        """What the token-making module returns, in a mode that makes its own tokens."""
        tokens = embed(self.vectors(latent, forward))
        positions = self.positions(module, forward, mode)
        return tokens if positions is None else (tokens + positions).to(tokens.dtype)

    def positions(self, module: Model, forward: Forward, mode: Mode) -> Tensor | None:
        """Position vectors ``(1, n, D)`` that the token-making module adds, if it does.

        Args:
            module: that makes tokens; it holds the stock table or what makes it.

        Returns:
            Those of the centres of the mode's groups, in units of base tokens; None where positions
            enter elsewhere.
        """
        return None

    def beside(self, module: Model, tokens: Tensor, *others: Tensor) -> Tensor:
        """What the token-making module returns: tokens, and what it makes of its other inputs."""
        return tokens

    def phases(
        self, module: Model, forward: Forward, mode: Mode, stock: Callable[..., Any], args: tuple
    ) -> Any:
        """Rotary phases of a mode's tokens, as the stock rotary module would return them.

        Args:
            stock: the stock ``forward`` of that module.
            args: its arguments, which speak of base tokens.
        """
        raise AssertionError(f"{self.model_class} names a rotary module and makes no phases")

    def prepare(self, call: Call, forward: Forward, mode: Mode) -> Call:
        """Arguments that depend on the grid, rewritten for a mode that makes its own tokens.

        Returns:
            A call of its own where anything is rewritten; the pipeline's tensors are left as they
            are.
        """
        return call

    def averaged(self, residual: Tensor, forward: Forward, mode: Mode) -> Tensor:
        """What a control network adds to the tokens of a mode, and to whatever stands behind them.

        Args:
            residual: what it adds to base tokens, ``(B, N, D)``, and to the rest.
        """
        count = math.prod(forward.grid)
        means = group_means(residual[:, :count], forward.grid, mode.patch_scale)
        return torch.cat([means, residual[:, count:]], dim=1)

    def output_grid(self, grid: Triple) -> Triple:
        """Base grid of one row of what enters the output layer."""
        return grid

    def base_vectors(
        self,
        forward: Forward,
        mode: Mode,
        stock: Callable[[Tensor], Tensor],
        hidden: Tensor,
        project: Project,
    ) -> Tensor:
        """What the output layer returns, in a mode that makes its own tokens.

        Args:
            stock: the stock ``forward`` of the output layer, for tokens that are not the picture's.
            hidden: what that layer is given, ``(B, n, D)``.
            project: the mode's own projection.

        Returns:
            ``(B, N, c_out)`` in base order, as the stock un-patchify expects it, and the rest.
        """
        grid = self.output_grid(forward.grid)
        count = math.prod(coarse_grid(grid, mode.patch_scale))
        vectors, given = project(hidden[:, :count], grid), hidden[:, count:]
        return torch.cat([vectors, stock(given)], dim=1) if given.shape[1] else vectors

    def block_hooks(self, model: Model) -> Iterator[tuple[nn.Module, BlockHook]]:
        """Forward pre-hooks of blocks that are given something of the base grid's size.

        A hook finds the pass by `ditdial.backbones.forward.forward_of`, so that it survives a copy.
        """
        return iter(())

    def low_rank_layers(self, model: Model) -> Iterator[tuple[str, nn.Linear]]:
        """Linear layers of self-attention and feed-forward, with their names."""
        layers = named(model, self.low_rank)
        return ((name, layer) for name, layer in layers if re.search(self.adapts, name))

    def adapting(self, pattern: str) -> Backbone:
        """The same knowledge for a method that adapts the layers whose names match."""
        view = copy.copy(self)
        view.adapts = pattern
        return view

    def identity(self, model: Model) -> dict[str, Any]:
        """The facts an adapter must share with its base: class, width, depth, patch, channels.

        They are written into adapters as plain data, and compared before one is loaded.
        """
        facts = {name: getattr(model.config, name) for name in self.facts}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()}
        return {"class": self.model_class, **plain}

    def check(self, model: Model, modes: set[Mode]) -> None:
        """Refuse modes that this model cannot run.

        Raises:
            ValueError: naming the mode and why.
        """
        for mode in modes:
            if "t" not in self.axes and mode.patch_scale[0] != 1:
                raise ValueError(
                    f"mode {mode.name!r} joins frames; {self.model_class} has tokens of one frame "
                    "each; legal: patchK, patch1xHxW"
                )
            turns = self.streamed is not None and self.streamed.phases is not None
            if mode.is_sparse and turns and max(mode.patch_scale[1:]) > WIDEST_TURN:
                raise ValueError(
                    f"mode {mode.name!r} needs rotary phases between tokens that turn by more than "
                    f"half a circle against each other in {self.model_class}; legal: sparse grids "
                    f"of tokens of at most {WIDEST_TURN} base patches along height and width"
                )

    def fits(self, model: Model, mode: Mode) -> bool:
        """Whether this model can run a mode."""
        try:
            self.check(model, {mode})
        except ValueError:
            return False
        return True

    def check_call(self, call: Call, mode: Mode) -> None:
        """Refuse arguments that only fit base tokens.

        Raises:
            ValueError: naming the argument and the mode.
        """
        self.arguments.check(call, mode)

    def check_grid(self, grid: Triple, mode: Mode) -> None:
        """Refuse a latent smaller than one coarse patch.

        Raises:
            ValueError: naming the mode, the grid and the largest legal scale.
        """
        grid, mode = fitting(grid, mode), mode.inside
        if any(k > max(side, 1) for k, side in zip(mode.patch_scale, grid, strict=True)):
            t, h, w = grid
            raise ValueError(
                f"mode {mode.name!r} does not fit the {t}x{h}x{w} base grid of this latent; "
                f"legal: at most {t}x{h}x{w} base patches per token"
            )
        _, height, width = coarse_grid(grid, mode.patch_scale)
        if mode.token_grid is not None and (
            mode.token_grid[0] > height or mode.token_grid[1] > width
        ):
            raise ValueError(
                f"mode {mode.name!r} does not fit the {height}x{width} tokens of this latent; "
                f"legal: a sparse grid of at most {height}x{width}"
            )

    def as_volume(self, tokens: Tensor, forward: Forward, mode: Mode) -> Tensor:
        """``(B, n, D)`` -> ``(B, D, t, h, w)``, what a patch convolution returns.

        For classes whose stock forward flattens the volume itself.
        """
        # Contiguous as a convolution's: other strides in the first block cost one more graph.
        volume = tokens.transpose(1, 2).contiguous()
        return volume.unflatten(2, coarse_grid(forward.grid, mode.patch_scale))
