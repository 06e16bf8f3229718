"""What the calls of an elastic model cost, and the record of a run."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ditdial.cost.shape import Kept, TransformerShape
from ditdial.host.device import Stopwatch
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.report import CallRecord
from ditdial.runtime.surgery import Surgery


@dataclass(eq=False)
class Ledger:
    """Of one elastic model.

    Attributes:
        calls: those of the present run.
        kept: what routed modes left in, when each of them last ran.
    """

    surgery: Surgery
    calls: list[CallRecord] = field(default_factory=list)
    kept: dict[Mode, tuple[Kept, ...]] = field(default_factory=dict)
    shapes: dict[tuple[tuple[Any, ...], bool], TransformerShape] = field(default_factory=dict)

    def shape_of(
        self, model: nn.Module, size: tuple[Any, ...] | None = None, *, merged: bool
    ) -> TransformerShape:
        """What the cost of the elastic model depends on.

        Args:
            size: base grid and text tokens, as `Backbone.size` returns them; the backbone's usual
                ones by default.
            merged: whether low-rank updates are part of the weights.

        Raises:
            ValueError: a grid that is not three whole numbers above zero.
        """
        surgery, backbone = self.surgery, self.surgery.wiring.backbone
        method = surgery.tensors.method
        call_size: tuple[Any, ...] = backbone.default_size(model) if size is None else size
        if len(call_size[0]) != 3 or any(side < 1 for side in call_size[0]):
            raise ValueError(f"grid = {call_size[0]}; legal: (frames, height, width), each >= 1")
        key = call_size, merged
        if key not in self.shapes:
            own = surgery.with_own_blocks(model)
            shape = method.priced(backbone.shape(own, *call_size), own, backbone)
            if surgery.widths is not None:
                shape = replace(shape, routable=surgery.widths.routable)
            updates = () if merged else method.updates(shape, own, backbone, call_size)
            self.shapes[key] = replace(shape, updates=updates, skips=method.skips)
        shape = self.shapes[key]
        if surgery.widths is None:
            return shape
        kept = functools.partial(surgery.widths.kept, model)
        return replace(shape, kept=kept)

    def record(
        self,
        shape: TransformerShape,
        count: int,
        watch: Stopwatch,
        level: float | None,
        mode: Mode | None,
        guide: Mode | None = None,
        *,
        branch: str | None,
        repeated: int = 0,
        guided: bool = False,
        pictures: tuple[int, ...] | None = None,
        why: tuple[dict[str, Any] | None, ...] = (),
    ) -> None:
        """Keep what a call ran.

        Args:
            shape: of the model for the call's size.
            count: rows.
            mode, guide: of the branches; ``mode`` is None where it only repeated a prediction.
            branch: that the pipeline called the model for, if it tells.
            repeated: rows whose text layers were computed in another call.
            guided: both branches are in the call.
            pictures: that the rows belong to; None for all.
            why: what a controller chose by, picture by picture.
        """
        shown = count // 2 if guided else count
        kept = repeated * shape.text_tokens * shape.text_once
        spent = self._spent(shape, mode, level) if mode is not None else 0.0
        if mode is not None and guide is not None:
            spent += self._spent(shape, guide, level)
        self.calls.append(
            CallRecord(
                level=level,
                mode=mode,
                guide=guide,
                branch=branch,
                rows=count,
                macs=shown * spent - kept,
                full_macs=count * shape.macs(FULL),
                watch=watch.stop(),
                pictures=pictures,
                why=why,
                guided=guided,
            )
        )

    def _spent(self, shape: TransformerShape, mode: Mode, level: float | None) -> float:
        """Multiply-adds of a picture in a mode that has just run."""
        return shape.macs(mode, level, self.kept.get(mode))
