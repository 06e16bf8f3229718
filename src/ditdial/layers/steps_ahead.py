"""What noise level and label alone decide, computed for many steps of a run in one go.

A DiT embeds time and label, and maps the result to shifts, scales and gates, in every block. These
products do not shrink with the tokens: in the coarsest modes of a small model they are a quarter of
a step. But a run's noise levels are known when it starts, and many rows cost little more than few.

Shape legend: T noise levels, B rows of a call, D width.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditdial.backbones.base import Backbone
from ditdial.host.weights import is_hooked, versions
from ditdial.layers.state import ROUTER, SOURCE, Router, TextKey
from ditdial.plan.mode import Mode

MANY = 1000
"""Levels of a scheduler that was told no number of steps."""

BYTES = 2**26
"""Of all tables of one batch; a run that needs more makes them for some of its steps at a time."""

BATCHES = 6
"""Different batches of rows in a run; one with more gives its rows a new tensor at each step."""


@dataclass(frozen=True, eq=False)
class Table:
    """Outputs of a layer for all levels, ``(T * B, X)``, and ``(B, X)`` for each of them.

    Attributes:
        inputs: the table it was given, if it stands behind an embedder.
    """

    inputs: Table | None
    rows: Tensor
    steps: tuple[Tensor, ...]


@dataclass(eq=False)
class BatchTables:
    """Outputs of a run's embedders, and of the linear layers behind them, for one batch of rows.

    Attributes:
        keys: the batch's labels, those of each part apart if it is packed.
        mode: whose tables these are. Branches of one label and two modes have tables each: what a
            run costs should be what was planned.
        levels: noise levels from the present call on.
        times: the same, as the model is given them.
        factor: what the model multiplies times by before it embeds them.
        place: of the present call among them.
        asked: how often the present call has asked each embedder. DiT asks its first one twice, and
            each asking has a table of its own, for the same reason.
        weights: of all layers that have tables, and what they were like when these were made.
        looked: stretch of calls in which they were last looked at.
        repeated: arguments of the embedder that asked last, and these for all levels.
        waves: times whose sinusoids were made last, how, and these; all embedders make the same.
    """

    keys: tuple[TextKey, ...]
    mode: Mode
    levels: tuple[float, ...]
    times: tuple[float, ...]
    factor: float = 1.0
    place: int = 0
    asked: defaultdict[nn.Module, int] = field(default_factory=lambda: defaultdict(int))
    tables: dict[tuple[nn.Module, int], Table] = field(default_factory=dict)
    weights: tuple[list[Tensor], object] = field(default_factory=lambda: ([], ()))
    looked: int = -1
    repeated: tuple[tuple[Any, ...], list[Any]] | None = None
    waves: tuple[Tensor, object, Tensor] | None = None

    def begin(self, level: float, stretch: int) -> None:
        """A call at one of the levels; tables of weights that have changed are dropped."""
        self.place = self.levels.index(level)
        self.asked.clear()
        if self.looked == stretch:
            return
        self.looked, (weights, before) = stretch, self.weights
        if versions(*weights) != before:
            self.tables.clear()
            self.weights = [], ()

    def embedded(
        self, module: nn.Module, stock: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Rows ``(B, D)`` of an embedder of times and labels."""
        key = module, self.asked[module]
        self.asked[module] += 1
        table = self._table(key, None, lambda: stock(*self._repeated(args), **kwargs))
        return table.steps[self.place]

    def mapped(self, module: nn.Module, stock: Callable[..., Tensor], _: Tensor) -> Tensor:
        """Rows ``(B, X)`` of a linear layer that is given SiLU of an embedder's output."""
        inputs = self.tables[module.__dict__[SOURCE], 0]
        table = self._table((module, 0), inputs, lambda: stock(F.silu(inputs.rows)))
        return table.steps[self.place]

    def _table(
        self, key: tuple[nn.Module, int], inputs: Table | None, make: Callable[[], Tensor]
    ) -> Table:
        known = self.tables.get(key)
        if known is not None and known.inputs is inputs:
            return known
        rows = make()
        steps = rows.unflatten(0, (len(self.times), -1)).unbind()
        self.tables[key] = made = Table(inputs, rows, steps)
        weights = [*self.weights[0], *key[0].parameters()]
        self.weights = weights, versions(*weights)
        return made

    def _repeated(self, args: tuple[Any, ...]) -> list[Any]:
        """Arguments of an embedder for all levels: ``(B, ...)`` become ``(T * B, ...)``."""
        if self.repeated is not None:
            given, repeated = self.repeated
            if len(given) == len(args) and all(map(operator.is_, given, args)):
                return repeated
        now, count = args[0], len(self.times)
        times = torch.tensor(self.times)
        times = (times if now.is_floating_point() else times.round()).to(now) * self.factor
        others = [
            x.repeat(count, *[1] * (x.ndim - 1)) if torch.is_tensor(x) else x for x in args[1:]
        ]
        repeated = [times.to(now).repeat_interleave(len(now)), *others]
        self.repeated = args, repeated
        return repeated

    def sinusoids(self, module: Any, stock: Callable[..., Tensor], times: Tensor) -> Tensor:
        """Sinusoids of times ``(T * B,)``; every embedder has a layer of its own for them."""
        how = module.num_channels, module.flip_sin_to_cos, module.downscale_freq_shift, module.scale
        if self.waves is None or self.waves[0] is not times or self.waves[1] != how:
            self.waves = times, how, stock(times)
        return self.waves[2]


class RunTables:
    """The tables of a run, by batch of rows.

    Args:
        by_mode: whether the method changes the embedder's output by mode; such rows are not packed.

    Attributes:
        levels: noise levels of the run's calls.
    """

    def __init__(self, backbone: Backbone, model: nn.Module, *, by_mode: bool) -> None:
        self.backbone, self.by_mode = backbone, by_mode
        layers = [layer for _, behind in backbone.embedded(model) for layer in behind]
        self.row_bytes = sum(x.out_features * x.weight.element_size() for x in layers)
        self.begin(())

    def begin(self, levels: tuple[float, ...]) -> None:
        """Forget everything; ``levels`` are those of the next run.

        As many as a scheduler has by itself are taken for no run.
        """
        self.levels, self.tables = levels if len(levels) < MANY else (), []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"levels": (), "tables": []}

    def of(
        self,
        model: nn.Module,
        labels: tuple[Any, ...],
        mode: Mode,
        level: float,
        router: Router,
        is_alike: Callable[[float], bool],
    ) -> BatchTables | None:
        """The tables for a call's rows; None if its level is not one of the run's.

        Args:
            labels: of the call, part by part if it is packed.
            level: of the call, as planned.
            router: of the model; tells the run and the stretch of calls.
            is_alike: whether the same rows will run in the same mode at another noise level.
        """
        if level not in self.levels or not all(map(torch.is_tensor, labels)):
            return None
        if self.by_mode and len(labels) > 1:
            return None
        keys = tuple([TextKey(x, router.run) for x in labels])
        alike = [x for x in self.tables if x.mode == mode and _same(x.keys, keys)]
        found = next((x for x in alike if level in x.levels), None)
        if found is None:
            now = self.levels.index(level)
            coming = tuple(dict.fromkeys(x for x in self.levels[now:] if is_alike(x)))
            self.tables = [x for x in self.tables if self.levels.index(x.levels[-1]) > now]
            if len(self.tables) >= BATCHES or self._hooked(model):
                return None
            rows = sum(map(len, labels))
            coming = coming[: max(1, BYTES // (rows * self.row_bytes))]
            times = tuple(self.backbone.time_of(x) for x in coming)
            found = BatchTables(keys, mode, coming, times, self.backbone.time_factor)
            self.tables.append(found)
        found.begin(level, router.stretch)
        return found

    def _hooked(self, model: nn.Module) -> bool:
        pairs = self.backbone.embedded(model)
        return any(is_hooked(x) for one, layers in pairs for x in (*one.modules(), *layers))


def _same(keys: tuple[TextKey, ...], others: tuple[TextKey, ...]) -> bool:
    return len(keys) == len(others) and all(map(TextKey.same, keys, others))


class _TabledSeam(nn.Module):
    """Mixed into a module whose outputs may be in tables."""

    from_tables: Callable[..., Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stock output, from a table where the router has one."""
        router: Router = self.__dict__[ROUTER]
        stock = super().forward  # pyrefly: ignore[missing-attribute]
        if router.ahead is None:
            return stock(*args, **kwargs)
        return type(self).from_tables(router.ahead, self, stock, *args, **kwargs)


class EmbedderSeam(_TabledSeam):
    """Mixed into a module that embeds times and labels."""

    from_tables = BatchTables.embedded


class TimesSeam(_TabledSeam):
    """Mixed into the module of an embedder that makes sinusoids of times."""

    from_tables = BatchTables.sinusoids


class EmbeddedSeam(_TabledSeam):
    """Mixed into a linear layer that is given SiLU of an embedder's output and nothing else."""

    from_tables = BatchTables.mapped
