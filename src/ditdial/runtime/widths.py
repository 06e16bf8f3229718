"""Routed modes on a live model: which submodules they narrow, and by how much at each noise level.

The masks depend on the timestep alone, so that the sub-network of each step is known before the
run. Steps may share one: with ``buckets`` set, neighbouring steps run the union of what they open,
so that no more than that many narrow copies of the weights are ever needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ditdial.backbones import Backbone
from ditdial.backbones.arguments import Call
from ditdial.backbones.routed import has_fused
from ditdial.cost.blocks import Kept, Tokens
from ditdial.cost.shape import TransformerShape
from ditdial.host.loras import is_wrapper, stock_name
from ditdial.host.weights import is_ordinary
from ditdial.layers.swap import is_swapped
from ditdial.layers.width import (
    ColumnsSeam,
    HeadsNormSeam,
    HeadsSeam,
    Place,
    ResidualSeam,
    RowsSeam,
    SkipRowsSeam,
    SkipSeam,
)
from ditdial.layers.width_pass import Narrow, Routing
from ditdial.ops.patching import coarse_grid
from ditdial.plan.mode import Mode

EVEN = tuple((i + 0.5) / 20 for i in range(20))
"""Noise levels over which a mode's mean is taken."""

FAR = 100.0
"""An offset that opens or closes everything."""

Opened = dict[str, Tensor]
"""Open slots of each block, ``(L, S)`` booleans by role."""


class Widths:
    """What each routed mode leaves in at each noise level.

    Attributes:
        buckets: how many different sub-networks of a mode a run may have; 0 for one per step.
        slices: how many narrow copies of its weights each layer keeps for later calls.
        narrowing: what narrows in each block, for the share of its work that is left.
        layers, attention: names of the linear layers, and of the attention, that are narrowed.
        last: what the last forward pass left out.
    """

    last: Narrow

    def __init__(
        self, routing: Routing, shape: TransformerShape, backbone: Backbone, model: nn.Module
    ) -> None:
        self.routing, self.backbone, self.buckets, self.slices = routing, backbone, 0, 1
        blocks = list(backbone.routed_blocks(model))
        self.narrowing = [block.narrowing() for block in shape.blocks]
        names = {module: name for name, module in model.named_modules()}
        self.layers = [stock_name(names[layer]) for block in blocks for layer in block.layers]
        self.attention = [names[block.attention] for block in blocks]
        self.begin(())

    def seams(self, model: nn.Module) -> Iterator[tuple[nn.Module, type, Place]]:
        """The submodules that take part, what is mixed into them, and their places."""
        names = {module: name for name, module in model.named_modules()}
        for index, block in enumerate(self.backbone.routed_blocks(model)):
            heads = Place(index, "heads", block.width)
            halves = block.widen.out_features > block.channels  # the second one gates the first
            channels = Place(index, "channels", block.channels, early=not halves)

            def at(place: Place, layer: nn.Module) -> Place:
                return replace(place, name=stock_name(names[layer]))

            yield block.attention, HeadsSeam, heads
            for layer in (*block.inputs, *block.text_inputs):
                yield layer, RowsSeam, at(heads, layer)
            for layer in (*block.outputs, *block.text_outputs):
                yield layer, ColumnsSeam, at(heads, layer)
            for norm in block.norms:
                yield norm, HeadsNormSeam, heads
            yield block.widen, RowsSeam, at(channels, block.widen)
            both = replace(channels, role="both") if block.shared else channels
            yield block.narrow, ColumnsSeam, at(both, block.narrow)
            if block.residual is None or not self.routing.tokens:
                continue
            yield block.residual, ResidualSeam, both
            if block.feed_forward is not None:
                yield block.feed_forward, SkipSeam, channels
            else:
                yield block.widen, SkipRowsSeam, at(channels, block.widen)
                yield block.narrow, SkipRowsSeam, at(both, block.narrow)

    def of(self, model: nn.Module, call: Call, mode: Mode, level: float) -> Narrow:
        """What a routed mode leaves out of a call.

        Args:
            level: of the call, as planned.

        Raises:
            ValueError: rows of different noise levels, which cannot share slices.
            RuntimeError: a layer that is no longer a plain one.
        """
        if self.routing.gated:
            times = torch.as_tensor(call[self.backbone.times.argument]).reshape(-1)
            self.last = self.routing.gating(mode, self.backbone.times.vector(model, times))
            self.last.text = self.backbone.text_tokens(call)
            return self.last
        low, high = self.backbone.times.levels(call)
        if low != high:
            raise ValueError(
                f"noise levels of a batch go from {low} to {high}, and mode {mode.name!r} cuts its "
                "layers for one; legal: one noise level"
            )
        self._check_layers(model)
        self.last = self.narrow(model, mode, level)
        self.last.text = self.backbone.text_tokens(call)
        return self.last

    def _check_layers(self, model: nn.Module) -> None:
        """Refuse layers that somebody has put something else in the place of."""
        for name in self.attention:
            if has_fused(model.get_submodule(name)):
                raise RuntimeError(
                    f"{name} has fused projections, from which no heads can be taken; legal in "
                    "routed modes: unfuse them (model.unfuse_qkv_projections())"
                )
        for name in self.layers:
            layer: Any = model.get_submodule(name)
            if is_swapped(layer) and is_ordinary(layer.weight):
                continue
            why, way = f"weights of type {type(layer.weight).__name__}", "a plain linear layer"
            if is_wrapper(layer):
                why, way = "a LoRA", "fuse the LoRA and unload it (pipe.fuse_lora(), "
                way += "pipe.unload_lora_weights())"
            raise RuntimeError(
                f"{name} is a {type(layer).__name__} by now ({why}), from which no rows can be "
                f"taken; legal in routed modes: {way}, or full mode"
            )

    def __getstate__(self) -> dict[str, Any]:
        # A copied model finds everything out again; what was found holds on to the original.
        kept = {k: v for k, v in self.__dict__.items() if k != "last"}
        return kept | {name: {} for name in ("opened", "mixes", "features", "made")}

    def begin(self, levels: Sequence[float]) -> None:
        """Forget everything; ``levels`` are those of the next run."""
        self.levels = tuple(sorted(set(levels)))
        self.opened: dict[tuple[Mode, float], Opened] = {}
        self.mixes: dict[float, Tensor | None] = {}
        self.features: dict[Any, Tensor] = {}
        self.made: dict[tuple[Mode, float], Narrow] = {}

    def at(self, model: nn.Module, mode: Mode, level: float) -> Opened:
        """What a mode opens at a noise level.

        The routers are asked for all levels of the present run at once, so that buckets can join
        neighbouring steps; a level outside the run is asked by itself.

        Returns:
            Open slots of each block, ``(L, S)`` booleans by role, on the CPU.
        """
        mode = self.routing.routed_as(mode)
        key = (mode, level)
        if key not in self.opened:
            self._dial(model, mode)
            levels = self.levels if level in self.levels else (level,)
            times = torch.tensor([self.backbone.times.time_of(each) for each in levels])
            with torch.no_grad():
                time = self.backbone.times.vector(model, times)
            found = {role: x.cpu() for role, x in self.routing.decide(mode, time).items()}
            with torch.no_grad():
                mixes = self.routing.mix(time)
            opened = [{role: x[i] for role, x in found.items()} for i in range(len(levels))]
            # Joined here and not when a step runs: a bucket is made of all steps that fall into it.
            if self.buckets and len(levels) > 1:
                opened = united(opened, self.buckets)
            for index, each in enumerate(levels):
                self.opened[mode, each] = opened[index]
                self.mixes[each] = None if mixes is None else mixes[index : index + 1]
        return self.opened[key]

    @torch.no_grad()
    def _dial(self, model: nn.Module, mode: Mode) -> None:
        """Find what to add to the logits for a width that was not trained for.

        Raises:
            ValueError: a width that no threshold gives; says which ones are given.
        """
        offsets = self.routing.offsets
        if mode in offsets or self.routing.is_trained(mode):
            return
        times = torch.tensor([self.backbone.times.time_of(each) for each in EVEN])
        time = self.backbone.times.vector(model, times)
        tokens = torch.tensor([self.routing.token_shares(mode, each) for each in EVEN])
        works = torch.tensor(self.works(model, mode))

        def share(offset: float) -> float:
            offsets[mode] = offset
            opened = self.routing.decide(mode, time)
            heads, channels = (opened[x].float().mean(-1).cpu() for x in ("heads", "channels"))
            left = heads * works[:, 0] + channels * tokens * works[:, 1]
            return float(left.sum(1).mean() / works.sum())

        # The open share rises with the offset, so that halving finds the width that was asked for.
        low, high = -FAR, FAR
        least, most = share(low), share(high)
        if not least <= mode.width <= most:
            del offsets[mode]
            raise ValueError(
                f"width = {mode.width}; legal for these routers: {math.ceil(100 * least) / 100} to "
                f"{math.floor(100 * most) / 100}, since what tokens skip is as trained"
            )
        for _ in range(40):  # 2 * FAR / 2^40 is below the steps of float32 logits
            middle = (low + high) / 2
            low, high = (middle, high) if share(middle) < mode.width else (low, middle)
        # Of the two sides of a step, the nearer one.
        offsets[mode] = min((low, high), key=lambda offset: abs(share(offset) - mode.width))

    def works(self, model: nn.Module, mode: Mode) -> list[tuple[float, float]]:
        """What narrows with the heads of each block, and what with its channels and tokens."""
        grid, text = self.backbone.default_size(model)
        tokens = Tokens.on(coarse_grid(grid, mode.patch_scale), text)
        heads, channels = (
            [block.total(block.terms, tokens, kept) for block in self.narrowing]
            for kept in (Kept(1, 0, 0), Kept(0, 1, 1))
        )
        return list(zip(heads, channels, strict=True))

    def narrow(self, model: nn.Module, mode: Mode, level: float) -> Narrow:
        """A forward pass of a mode at a noise level, sliced."""
        key = (mode, level)
        opened = self.at(model, mode, level)
        if key not in self.made:
            self.made[key] = self.routing.sliced(mode, opened, self.mixes[level], self.features)
        narrow = self.made[key]
        narrow.slices = self.slices
        narrow.forget()
        return narrow

    def kept(self, model: nn.Module, mode: Mode, level: float | None) -> list[Kept]:
        """What each block leaves in; in the mean over all levels if none is given."""
        tokens = self.routing.token_shares(mode, level)
        if level is None:
            shares = [_shares(self.at(model, mode, each)) for each in EVEN]
            means = torch.tensor(shares).mean(0).tolist()
        else:
            means = _shares(self.at(model, mode, level))
        return [Kept(h, c, t) for (h, c), t in zip(means, tokens, strict=True)]


def _shares(opened: Opened) -> list[tuple[float, float]]:
    heads, channels = (opened[role].float().mean(1).tolist() for role in ("heads", "channels"))
    return list(zip(heads, channels, strict=True))


def united(opened: list[Opened], buckets: int) -> list[Opened]:
    """Neighbouring steps joined, what adds least first, until no more than ``buckets`` are left.

    Each turn joins the two neighbours whose union opens the fewest slots in vain, counted once for
    each step that did not ask for them.

    Returns:
        For each step what its bucket opens: at least what the step itself does.
    """
    runs: list[tuple[Opened, int]] = [(each, 1) for each in opened]
    while len(runs) > buckets:
        costs = [_added(a, b) for a, b in zip(runs, runs[1:], strict=False)]
        best = costs.index(min(costs))
        (a, n), (b, m) = runs[best : best + 2]
        runs[best : best + 2] = [({role: a[role] | b[role] for role in a}, n + m)]
    return [union for union, count in runs for _ in range(count)]


def _added(a: tuple[Opened, int], b: tuple[Opened, int]) -> float:
    """Slots opened in vain if two runs of steps were joined."""
    vain = 0.0
    for role in a[0]:
        union = (a[0][role] | b[0][role]).sum()
        vain += a[1] * (union - a[0][role].sum()) + b[1] * (union - b[0][role].sum())
    return float(vain)
