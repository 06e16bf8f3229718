"""The state of one forward pass, which a model's submodules look at: plain Python data.

The engine sets it outside any compiled region, so that each mode has a graph of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ditdial.backbones.forward import Forward
from ditdial.host.weights import versions
from ditdial.layers.packing import Layout
from ditdial.layers.token_grids import TokenGrids
from ditdial.layers.width_pass import Narrow
from ditdial.ops.patching import Triple
from ditdial.plan.mode import FULL, Mode


@dataclass(frozen=True)
class TextKey:
    """A prompt's tensor in one run. Holding it keeps its memory from being used again.

    Attributes:
        facts: what changes with memory, content or run; read at once, since the tensor may be
            written to later.
    """

    tensor: Tensor
    run: int
    facts: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        facts = self.run, versions(self.tensor), self.tensor.shape, self.tensor.stride()
        object.__setattr__(self, "facts", facts)

    def __reduce__(self) -> tuple[Any, ...]:
        return TextKey, (self.tensor, self.run)  # a copied tensor has memory of its own

    def same(self, other: TextKey) -> bool:
        """Whether both are the same memory with the same content, in the same run."""
        return self.facts == other.facts


class Snapshot(NamedTuple):
    """What of a state a block runs in: enough to run it again."""

    mode: Mode
    makes_tokens: bool
    layout: Layout | None
    grid: Triple
    narrow: Narrow | None
    grids: TokenGrids | None


@dataclass(eq=False)
class State(Forward):
    """The state of the present forward pass of one elastic model.

    Attributes:
        running: the engine has started the present pass.
        asked: the mode that was asked for; ``mode`` is what of it runs at the size of the latent.
        run: number of the present run; what was computed in another may be stale.
        merging: weights with the mode's low-rank updates added in are used where there are any.
        layout: of a packed batch, else None.
        narrow: what a routed pass leaves out; None for nothing.
        grids: of a pass in a sparse mode.
        text: what the text layers' outputs depend on, if they are to be kept for a whole run.
        sinusoids: times that were embedded in this pass, and their sinusoids.
        unit: base tokens per axis in which a compiled forward is told the grid.
    """

    running: bool = False
    asked: Mode = FULL
    run: int = 0
    merging: bool = False
    layout: Layout | None = None
    narrow: Narrow | None = None
    grids: TokenGrids | None = None
    text: TextKey | None = None
    sinusoids: tuple[Tensor, Tensor] | None = None
    unit: Triple = (1, 1, 1)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Of the present pass: one, or that of each part of a packed batch."""
        return (self.mode,) if self.layout is None else self.layout.modes

    @contextlib.contextmanager
    def begin(
        self,
        *,
        narrow: Narrow | None = None,
        grids: TokenGrids | None = None,
        text: TextKey | None = None,
    ) -> Iterator[None]:
        """The present pass runs; nothing of it outlives the block.

        Args:
            narrow: what a routed pass leaves out.
            grids: the two token grids of a pass in a sparse mode.
            text: the prompt of the pass, where layers that see it alone are to keep their outputs.
        """
        self.narrow, self.grids, self.text, self.running = narrow, grids, text, True
        try:
            yield
        finally:
            self.narrow = self.grids = self.text = self.sinusoids = None
            self.running = self.makes_tokens = False
            # A control network that shares layers with the model calls them between its passes.
            self.mode = FULL

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Make room for another pass, if one is at work: a hook in it has called the model."""
        if not self.running:
            yield
            return
        now, rest = self.snapshot(), (self.text, self.merging, self.unit, self.run, self.asked)
        self.layout = None
        try:
            yield
        finally:
            self._return_to(now)
            self.text, self.merging, self.unit, self.run, self.asked = rest
            self.running = True

    def each(self, run: Callable[[Any], Any], pieces: Iterable[Any]) -> list[Any]:
        """What a layer makes of each part of a packed batch, in the mode of that part.

        Args:
            run: is given one piece; it sees a state without a layout.
            pieces: the layer's input for each part, in their order.
        """
        layout, before = self.layout, (self.mode, self.makes_tokens)
        assert layout is not None
        # Without a layout each part looks like a call of its own, to seams inside this one too.
        made, self.layout = [], None
        try:
            for part, piece in zip(layout.parts, pieces, strict=True):
                self.mode, self.makes_tokens = part.mode, part.makes_tokens
                made.append(run(piece))
        finally:
            self.layout, (self.mode, self.makes_tokens) = layout, before
        return made

    def snapshot(self) -> Snapshot:
        """What a block runs in."""
        return Snapshot(*(getattr(self, name) for name in Snapshot._fields))

    @contextlib.contextmanager
    def as_in(self, then: Snapshot) -> Iterator[None]:
        """The state of another time, for a while."""
        now = self.snapshot()
        self._return_to(then)
        try:
            yield
        finally:
            self._return_to(now)

    def _return_to(self, snapshot: Snapshot) -> None:
        for name, value in zip(Snapshot._fields, snapshot, strict=True):
            setattr(self, name, value)
