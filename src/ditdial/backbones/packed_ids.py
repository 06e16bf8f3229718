"""Classes whose pipeline packs latents into tokens and names the places of these by ids."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ditdial.backbones.arguments import Call
from ditdial.backbones.base import Backbone, Model
from ditdial.backbones.forward import Forward
from ditdial.host.pickling import Weak
from ditdial.ops.ids import centre_ids, first_grid
from ditdial.ops.patching import Triple
from ditdial.plan.mode import Mode


class KnownGrid:
    """Reading ids waits for the device, and pipelines pass the same tensor at every step."""

    def __init__(self) -> None:
        self._read: tuple[Weak, Any, Triple] | None = None

    def of(self, ids: Tensor, skip: int) -> Triple:
        """`ditdial.ops.ids.first_grid` of these ids."""
        seen = ids._version if not ids.is_inference() else None, skip
        if self._read is None or self._read[0]() is not ids or self._read[1] != seen:
            self._read = Weak(ids), seen, first_grid(ids, skip)
        return self._read[2]


class PackedBackbone(Backbone):
    """Ids of several pictures may stand in ``img_ids``; the first that is no reference is drawn."""

    def __init__(self) -> None:
        self.known = KnownGrid()

    def grid(self, model: Model, call: Call) -> Triple:
        return self.known.of(call["img_ids"], self.references_before(call))

    def references_before(self, call: Call) -> int:
        """Tokens of reference pictures that stand before the picture; others stand behind it."""
        return 0

    def check_call(self, call: Call, mode: Mode) -> None:
        super().check_call(call, mode)
        tokens, own = call["hidden_states"].shape[1], math.prod(self.grid(None, call))
        if mode.is_sparse and tokens != own:
            raise ValueError(
                f"img_ids name {tokens} tokens, {own} of them of the first picture, and the grids "
                f"of mode {mode.name!r} have no place for others; legal with reference pictures: "
                "a mode without a sparse grid"
            )

    def size(self, model: Model, call: Call) -> tuple[Any, ...]:
        grid, text_tokens = super().size(model, call)
        return grid, text_tokens, call["hidden_states"].shape[1] - math.prod(grid)

    def planned_size(
        self,
        grid: Triple,
        text_tokens: int,
        pipe: Any,
        *,
        reference_tokens: int = 0,
        **others: Any,
    ) -> tuple[Any, ...]:
        return *super().planned_size(grid, text_tokens, pipe, **others), reference_tokens

    def prepare(self, call: Call, forward: Forward, mode: Mode) -> Call:
        return call | {"img_ids": centre_ids(call["img_ids"], forward.grid, mode.patch_scale)}
