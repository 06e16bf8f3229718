"""What the calls of an elastic model cost."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ditdial.cost.blocks import Kept
from ditdial.cost.shape import TransformerShape
from ditdial.host.device import Stopwatch
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.report import CallRecord
from ditdial.runtime.surgery import Surgery


@dataclass(frozen=True, kw_only=True)
class CallFacts:
    """What one call of the elastic model ran.

    Args:
        shape: of the model for the call's size.
        rows: of the call's batch.
        level: noise level in [0, 1]; None where a mode was forced.
        mode, guide: of the branches; ``mode`` is None where it only repeated a prediction.
        branch: that the pipeline called the model for, if it tells.
        repeated: rows whose text layers were computed in another call.
        guided: both branches are in the call.
        pictures: that the rows belong to; None for all.
        why: what a controller chose by, picture by picture.
    """

    shape: TransformerShape
    rows: int
    level: float | None
    mode: Mode | None
    guide: Mode | None = None
    branch: str | None = None
    repeated: int = 0
    guided: bool = False
    pictures: tuple[int, ...] | None = None
    why: tuple[dict[str, Any] | None, ...] = ()


@dataclass(eq=False)
class Costs:
    """What the calls of one elastic model cost.

    Attributes:
        kept: what routed modes left in, when each of them last ran.
        cached: whether a step cache was on in the last forward pass.
    """

    surgery: Surgery
    kept: dict[Mode, tuple[Kept, ...]] = field(default_factory=dict)
    cached: bool = False
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
            self.shapes[key] = method.shape(own, backbone, call_size, merged=merged)
        shape = self.shapes[key]
        if surgery.widths is None:
            return shape
        kept = functools.partial(surgery.widths.kept, model)
        return replace(shape, kept=kept)

    def record(self, facts: CallFacts, watch: Stopwatch) -> CallRecord:
        """What a call ran, what that multiplies, and how long it took.

        Args:
            facts: of the call, once it has run.
            watch: started before the call; stopped here, and read only when somebody asks for the
                seconds, since reading waits for the device.
        """
        shape = facts.shape
        ran = [each for each in (facts.mode, facts.guide) if each is not None]
        # Of routed modes what their tokens really kept, where a pass has told it.
        spent = sum(shape.macs(each, facts.level, self.kept.get(each)) for each in ran)
        shown = facts.rows // 2 if facts.guided else facts.rows
        kept = facts.repeated * shape.text_tokens * shape.text_once
        return CallRecord(
            level=facts.level,
            mode=facts.mode,
            guide=facts.guide,
            branch=facts.branch,
            rows=facts.rows,
            macs=shown * spent - kept,
            full_macs=facts.rows * shape.macs(FULL),
            watch=watch.stop(),
            pictures=facts.pictures,
            why=facts.why,
            guided=facts.guided,
            cached=self.cached,
        )
