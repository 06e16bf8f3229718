"""The contract: what we must know of a diffusers model class to make it elastic.

A backbone is knowledge, not a model: which submodules make tokens and turn them back, how the base
patch vector is laid out, what the call's arguments mean. Most of it is class attributes; the
methods have defaults that fit most classes. One file each.
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
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ditdial.backbones.blocks import BlockList
from ditdial.backbones.call import Branches, Call, cut
from ditdial.backbones.layers import MODULATION, Layers, named, named_like
from ditdial.backbones.routed import Routed, RoutedBlock
from ditdial.backbones.streamed import Streamed
from ditdial.backbones.times import Times
from ditdial.cost.blocks import Block, Term
from ditdial.cost.linears import matrix_sizes
from ditdial.cost.shape import Patches, TransformerShape
from ditdial.host.pipelines import is_guided
from ditdial.host.weights import values
from ditdial.layers.state import Router
from ditdial.ops.patching import Triple, coarse_grid, from_base, to_grouped
from ditdial.plan.mode import Mode

Model = Any
"""A live diffusers model or submodule; `nn.Module` as a type would hide its attributes."""


BlockHook = Callable[[nn.Module, tuple, dict[str, Any]], tuple[tuple, dict[str, Any]] | None]
"""``hook(module, args, kwargs)`` as `torch.nn.Module.register_forward_pre_hook` takes it."""

Rewired = Callable[..., Any]
"""``method(model, router, stock, *args)`` in place of ``stock(*args)``, a method of the model."""

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


class Backbone(Times, ABC):
    """Knowledge of one diffusers model class.

    Attributes:
        model_class: name of the diffusers class.
        embed, output: submodules that make tokens and turn them into base patch vectors.
        rotary: submodule that makes the rotary phases of image tokens, if their grid is the only
            thing it depends on.
        rewired: methods of the model and what replaces them in modes that route their tokens, where
            no submodule makes patches or positions.
        sample: argument of the call that holds the latent.
        lists: arguments that are lists with an entry for each row.
        condition: arguments that carry the prompt or class; None for one that has none.
        labels: which of these the time is embedded with, if by nothing else (see `embedded`).
        embedder: the module that does so, where there is one for all blocks.
        facts: entries of the config that an adapter must share with its base.
        embed_layout, output_layout: order of channels and pixels inside a base patch vector.
        axes: latent axes that coarse patches may cover: ``hw``, or ``thw`` for video.
        conditional_first: which half of a guided batch is the conditional one; None if the pipeline
            calls the model once per branch.
        contexts: the guidance branch's names in ``cache_context``, if it is called by itself.
        low_rank: layers of self-attention and feed-forward by block list.
        adapts: which of them a method adapts: a regular expression that their names match.
        prompt_only: layers that see nothing but the prompt, by block list.
        reads_blocks: the stock forward looks into its blocks or counts them, beside calling them.
        residuals: arguments that hold something per base token (ControlNet's residuals), which
            coarse modes refuse.
        block_lists: which tokens go through the layers of its blocks; those that are routed or
            streamed come first, in the order they have there.
        shape_class: what its cost depends on.
        streamed: where tokens meet in its blocks, if sparse modes are known to work.
        packs: whether branches of different modes can share one packed call.
        masks_attention: whether the stock attention processors obey an attention mask.
        routed: layers that heads, channels and tokens go through, for each list of blocks.
    """

    model_class: str
    embed: str
    output: str
    rotary: str | None = None
    rewired: tuple[tuple[str, Rewired], ...] = ()
    sample: str = "hidden_states"
    lists: tuple[str, ...] = ()
    condition: tuple[str, ...] = ("encoder_hidden_states",)
    labels: str = ""
    embedder: str = ""
    facts: tuple[str, ...] = ()
    direction: float = 1.0
    embed_layout: str = "Cthw"
    output_layout: str = "thwC"
    axes: str = "hw"
    conditional_first: bool | None = False
    contexts: tuple[str, ...] = ("uncond",)
    low_rank: Layers = ()
    adapts: str = ""
    prompt_only: Layers = ()
    residuals: tuple[str, ...] = ()
    reads_blocks: bool = False
    block_lists: tuple[BlockList, ...]
    shape_class: type[TransformerShape] = TransformerShape
    streamed: Streamed | None = None
    packs: bool = False
    masks_attention: bool = False
    routed: tuple[Routed, ...] = ()

    def routed_blocks(self, model: Model) -> Iterator[RoutedBlock]:
        """The modules of every block that routed modes narrow, in the order they run in."""
        for blocks in self.routed:
            yield from blocks.of(model)

    def shape(self, model: Model, grid: Triple, text_tokens: int) -> TransformerShape:
        """What the model's cost depends on; may take more of what `size` returns."""
        first, last = self.projections(model)
        into, width = matrix_sizes(first)
        once = sum(each.once_macs(model) for each in self.block_lists)
        return self.shape_class(
            grid=grid,
            patches=Patches(width=width, into=into, out=last.out_features),
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
        """Base grid and number of text tokens where nothing else is said."""

    def size(self, model: Model, call: Call) -> tuple[Any, ...]:
        """What the cost of a call depends on beside the model: base grid, text tokens."""
        return self.grid(model, call), self.text_tokens(call)

    def planned_size(self, grid: Triple, text_tokens: int, pipe: Any) -> tuple[Any, ...]:
        """What `size` will return in a run of a pipeline (None for a bare model)."""
        return grid, text_tokens

    def patch(self, model: Model) -> Triple:
        """Latent frames, rows and columns of one base token."""
        size = model.config.patch_size
        return (1, size, size) if isinstance(size, int) else tuple(size)

    def grid(self, model: Model, call: Call) -> Triple:
        """Base grid ``(frames, height, width)`` of a call."""
        sides = self.stack(call[self.sample]).shape[2:]
        frames, height, width = sides if len(sides) == 3 else (1, *sides)
        t, h, w = self.patch(model)
        return frames // t, height // h, width // w

    def text_tokens(self, call: Call) -> int:
        """Text tokens of one picture."""
        text = call.get("encoder_hidden_states")
        return 0 if text is None else text.shape[1]

    def vectors(self, module: Model, latent: Tensor, router: Router) -> Tensor:
        """What the token-making module is given -> base patch vectors ``(B, T, H, W, c)``."""
        if latent.ndim == 3:  # packed by the pipeline, one vector per token
            return latent.unflatten(1, router.grid)
        if latent.ndim == 4:
            latent = latent[:, :, None]
        t, h, w = router.patch
        B, C, frames, height, width = latent.shape
        T, H, W = frames // t, height // h, width // w
        x = latent[:, :, : T * t, : H * h, : W * w].reshape(B, C, T, t, H, h, W, w)
        inside = {"C": 1, "t": 3, "h": 5, "w": 7}
        return x.permute(0, 2, 4, 6, *(inside[axis] for axis in self.embed_layout)).flatten(4)

    def tokens(self, module: Model, router: Router, mode: Mode, latent: Tensor) -> Tensor:
        """What the token-making module returns, in a mode that does not use its own weights."""
        tokens = router.sizes.embed(self.vectors(module, latent, router), mode)
        positions = self.positions(module, router, mode)
        return tokens if positions is None else (tokens + positions).to(tokens.dtype)

    def positions(self, module: Model, router: Router, mode: Mode) -> Tensor | None:
        """Position vectors ``(1, n, D)`` that the token-making module adds, if it does."""
        return None

    def beside(self, module: Model, tokens: Tensor, *others: Tensor) -> Tensor:
        """What the token-making module returns: tokens, and what it makes of its other inputs."""
        return tokens

    def phases(
        self, module: Model, router: Router, mode: Mode, stock: Callable[..., Any], args: tuple
    ) -> Any:
        """Rotary phases of a mode's tokens, as the stock rotary module would return them."""
        raise NotImplementedError(f"{self.model_class} names no rotary module")

    def prepare(self, call: Call, router: Router, mode: Mode) -> Call:
        """Arguments that depend on the grid, rewritten for a mode that routes its tokens."""
        return call

    def output_grid(self, grid: Triple) -> Triple:
        """Base grid of one row of what enters the output layer."""
        return grid

    def base_vectors(
        self, router: Router, mode: Mode, stock: Callable[[Tensor], Tensor], hidden: Tensor
    ) -> Tensor:
        """What the output layer returns, in a mode that does not use its own weights."""
        return router.sizes.project(hidden, mode, self.output_grid(router.grid))

    def block_hooks(self, model: Model) -> Iterator[tuple[nn.Module, BlockHook]]:
        """Forward pre-hooks of blocks that are given something of the base grid's size.

        A hook finds the router in ``module.__dict__[ROUTER]``, so that it survives a copy.
        """
        return iter(())

    def projections(self, model: Model) -> tuple[Model, Model]:
        """The layers that project patches into the model and out of it."""
        module = model.get_submodule(self.embed)
        return getattr(module, "proj", module), model.get_submodule(self.output)

    def embed_kernel(self, model: Model) -> tuple[Tensor, Tensor]:
        """Weight ``(D, C, pt, ph, pw)`` and bias ``(D,)`` of the base patch embedding."""
        layer, _ = self.projections(model)
        patch, weight = self.patch(model), values(layer)
        if weight.ndim == 2:
            kernel = from_base(
                weight, weight.shape[1] // math.prod(patch), patch, self.embed_layout
            )
        else:
            kernel = weight.reshape(*weight.shape[:2], *patch)
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
        return kernel, bias.to(weight.dtype)

    def output_rows(self, model: Model) -> tuple[Tensor, Tensor]:
        """Weight ``(D, C, pt, ph, pw)`` and bias ``(1, C, pt, ph, pw)`` of the base output."""
        (_, layer), patch = self.projections(model), self.patch(model)
        weight = values(layer)
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.to(weight.dtype)
        channels = len(bias) // math.prod(patch)
        rows = from_base(weight.T, channels, patch, self.output_layout)
        return rows, from_base(bias[None], channels, patch, self.output_layout)

    @torch.no_grad()
    def load_patch(
        self, model: Model, embed: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]
    ) -> None:
        """Write a base patch embedding and output projection, formed as those two above."""
        (layer, last), one = self.projections(model), (1, 1, 1)
        kernel = to_grouped(embed[0], one, self.embed_layout)
        layer.weight.copy_(kernel if layer.weight.ndim == 2 else embed[0].view_as(layer.weight))
        last.weight.copy_(to_grouped(output[0], one, self.output_layout).T)
        if layer.bias is not None:
            layer.bias.copy_(embed[1])
        if last.bias is not None:
            last.bias.copy_(to_grouped(output[1], one, self.output_layout)[0])

    def low_rank_layers(self, model: Model) -> Iterator[tuple[str, nn.Linear]]:
        """Linear layers of self-attention and feed-forward, with their names."""
        layers = named(model, self.low_rank)
        return ((name, layer) for name, layer in layers if re.search(self.adapts, name))

    def adapting(self, pattern: str) -> Backbone:
        """The same knowledge for a method that adapts the layers whose names match."""
        view = copy.copy(self)
        view.adapts = pattern
        return view

    def conditioning_layers(self, model: Model) -> Iterator[nn.Module]:
        """Modules whose output is the conditioning vector ``(B, D)``, which drives modulation."""
        return iter(())

    def embedded(self, model: Model) -> Iterator[tuple[nn.Module, list[nn.Linear]]]:
        """Modules that embed the time, given first, and `labels` alone, ``(B, D)``.

        Each comes with the linear layers that are given SiLU of its output and nothing else.
        """
        if self.embedder:
            yield model.get_submodule(self.embedder), named_like(model, MODULATION)

    def text_layers(self, model: Model) -> Iterator[nn.Module]:
        """Layers in the blocks whose input depends on the prompt alone, not on the step."""
        return (layer for _, layer in named(model, self.prompt_only))

    def modulation_layers(self, model: Model) -> Iterator[nn.Module]:
        """Modules whose output modulates all tokens of a picture (for packing)."""
        return iter(())

    def attention_layers(self, model: Model) -> Iterator[nn.Module]:
        """Attention modules that image tokens go through (for packing)."""
        return iter(())

    def branches(self, model: Model, call: Call, pipe: Any) -> Branches | None:
        """The guidance layout of a batched call, None if all rows are conditional.

        Pipelines that guide in one batch give both halves the same latents.
        """
        sample = self.stack(call[self.sample])
        count, half = len(sample), len(sample) // 2
        if self.conditional_first is None or count % 2:
            return None
        # In the first step, two prompts from equal noise are the very numbers of two branches.
        if is_guided(pipe) is False:
            return None
        if not torch.equal(sample[:half], sample[half:]):
            return None
        first, second = slice(0, half), slice(half, count)
        return Branches(first, second) if self.conditional_first else Branches(second, first)

    def rows(self, call: Call, index: slice | tuple[int, ...]) -> Call:
        """The arguments of some rows of a batched call."""
        total = len(call[self.sample])
        places = range(total)[index] if isinstance(index, slice) else index
        return {
            name: [value[i] for i in places] if name in self.lists else cut(value, index, total)
            for name, value in call.items()
        }

    def stack(self, sample: Any) -> Tensor:
        """Latents or predictions, of which some classes take and return lists, in one tensor.

        Raises:
            ValueError: a list of pictures that differ in size.
        """
        if self.sample not in self.lists:
            return sample
        sizes = {tuple(row.shape) for row in sample}
        if len(sizes) > 1:
            raise ValueError(
                f"{self.sample} holds latents of sizes {sorted(sizes)}; legal: all of one size"
            )
        return torch.stack(list(sample))

    def unstack(self, sample: Tensor) -> Any:
        """The inverse of `stack`."""
        return list(sample) if self.sample in self.lists else sample

    def give_condition(self, call: Call, condition: Call) -> Call:
        """``call`` with the condition of ``condition`` (for weak-model guidance)."""
        return call | {name: condition[name] for name in self.condition if name in condition}

    def identity(self, model: Model) -> dict[str, Any]:
        """The facts an adapter must share with its base: class, width, depth, patch, channels."""
        facts = {name: getattr(model.config, name) for name in self.facts}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()}
        return {"class": self.model_class, **plain}

    def wrap_output(self, sample: Any) -> Any:
        """The stock output object."""
        return Transformer2DModelOutput(sample=sample)

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
        for name in self.residuals:
            if call.get(name) is not None:
                raise ValueError(
                    f"{name} holds something for each base token, and mode {mode.name!r} has other "
                    "tokens; legal together with it: full mode"
                )

    def check_grid(self, grid: Triple, mode: Mode) -> None:
        """Refuse a latent smaller than one coarse patch.

        Raises:
            ValueError: naming the mode, the grid and the largest legal scale.
        """
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

    def as_volume(self, tokens: Tensor, router: Router, mode: Mode) -> Tensor:
        """``(B, n, D)`` -> ``(B, D, t, h, w)``, what a patch convolution returns."""
        # Contiguous as a convolution's: other strides in the first block cost one more graph.
        volume = tokens.transpose(1, 2).contiguous()
        return volume.unflatten(2, coarse_grid(router.grid, mode.patch_scale))


def pair(size: int | list[int] | tuple[int, ...], patch: int) -> tuple[int, int]:
    """Base tokens per axis of a latent side or pair of sides."""
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return height // patch, width // patch
