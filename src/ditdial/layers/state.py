"""How a live model's submodules learn the present mode: in-place class swap and one shared router.

A module's class is replaced by a generated subclass (same object, same weights, same keys, as FSDP2
does). What its ``forward`` does stands in `ditdial.layers.tokens` and its neighbours. No stock
``forward`` is copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditdial.host.weights import versions
from ditdial.layers.packing import Layout
from ditdial.ops.patching import Triple, coarse_grid
from ditdial.plan.mode import FULL, Mode

if TYPE_CHECKING:
    from ditdial.backbones.base import Backbone
    from ditdial.layers.new_modules import Sizes
    from ditdial.layers.token_grids import Streams
    from ditdial.layers.width_pass import Narrow

ENGINE = "_elastic_engine"
"""Attribute of an elastic model that holds its engine."""

ROUTER = "_elastic_router"
TEXT = "_elastic_text"
MERGED = "_elastic_merged"
PARTS = "_elastic_parts"
PLACE = "_elastic_place"
SLICES = "_elastic_slices"
ROLE = "_elastic_role"
MERGE = "_elastic_merge"


@dataclass(frozen=True)
class Place:
    """Where a module stands among the routed ones.

    Attributes:
        block: number of its block.
        role: whether heads or channels are its features, or both, one after the other.
        features: how many.
        name: of a linear layer, in the model.
    """

    block: int
    role: str = "heads"
    features: int = 0
    name: str = ""


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


@dataclass(eq=False)
class Router:
    """What a model's swapped submodules read: plain state, set outside any compiled region.

    Attributes:
        patch: latent frames, rows and columns of one base token.
        mode: of the present forward pass, when all rows share one.
        layout: of a packed batch, else None.
        grid: base grid ``(frames, height, width)`` of the present call.
        unit: base tokens per axis in which a compiled forward is told the grid.
        run: number of the present run; what was computed in another may be stale.
        streams: of the present forward pass, in a sparse mode.
        running: the engine has started the present forward pass.
        device: of the latent; weights may be elsewhere until their module's hooks bring them.
        lengths: of the text and of the whole sequence of each row, where a class joins them row by
            row.
        text: what the text layers' outputs depend on, if they are to be kept for a whole run.
        narrow: what the present forward pass leaves out; None for nothing.
        merged: use weights with the low-rank update added in (one more copy per mode) instead of
            unmerged updates.
    """

    backbone: Backbone
    sizes: Sizes
    patch: Triple = (1, 1, 1)
    mode: Mode = FULL
    layout: Layout | None = None
    streams: Streams | None = None
    running: bool = False
    run: int = 0
    text: TextKey | None = None
    lengths: tuple[list[int], list[int]] | None = None
    grid: Triple = (1, 0, 0)
    unit: Triple = (1, 1, 1)
    merged: bool = False
    merging: bool = False
    tables: dict[Any, Tensor] = field(default_factory=dict)
    device: Any = None
    narrow: Narrow | None = None

    def tokens(self, mode: Mode) -> int:
        """Tokens of one picture of the present grid."""
        return math.prod(coarse_grid(self.grid, mode.patch_scale))

    def each(self, run: Callable[[Any], Any], pieces: Iterable[Any]) -> list[Any]:
        """What a layer makes of each part of a packed batch, in the mode of that part."""
        layout, mode, made = self.layout, self.mode, []
        assert layout is not None
        self.layout = None
        try:
            for part, piece in zip(layout.parts, pieces, strict=True):
                self.mode = part.mode
                made.append(run(piece))
        finally:
            self.layout, self.mode = layout, mode
        return made

    def constant(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that only ``key`` decides, made once for each device."""
        key = key, self.device
        if key not in self.tables:
            if torch.compiler.is_compiling():  # it belongs to the graph
                return make().to(self.device)
            with torch.inference_mode(False):  # it may be trained with later
                self.tables[key] = make().to(self.device)
        return self.tables[key]
