"""PPFlow, pyramidal patchification flow (2506.23543): one patch size per stage of noise levels.

The latent keeps its full resolution; each stage has projections of its own around shared blocks and
is trained on its own noise levels only, with the base's flow-matching objective. A level marker is
added to the conditioning vector, which drives the modulation, and not to the tokens.

The finest stage is full mode with the retrained base weights; its marker is part of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditdial.backbones.base import Backbone
from ditdial.layers.new_modules import NewModules
from ditdial.methods.base import Method
from ditdial.methods.projections import OwnProjections, legal_scale
from ditdial.ops.patching import RESIZES, Triple
from ditdial.plain.checks import one_of
from ditdial.plain.kinds import checked_fields
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.schedule import Schedule, Segment

Stage = tuple[float, int | Triple]

TWO_LEVELS: tuple[Stage, ...] = ((0.5, 2),)
"""The paper's two-level variant: coarse in the noisier half."""

THREE_LEVELS: tuple[Stage, ...] = ((0.5, 2), (0.25, (1, 1, 2)))
"""Its three-level variant; the middle stage joins two patches side by side."""


POSITIONS = ("centre", "corner")

XL_2_SCALES = (1.0, 3.0)
XL_3_SCALES = (1.0, 3.5, 3.75)
"""Guidance scales of the stages behind the published distances of PPF-XL-2 and PPF-XL-3."""


def stage_gains(scales: Sequence[float]) -> tuple[float, ...]:
    """Gains that give each stage a guidance scale of its own, as ``gains`` of `PPFlow`.

    Args:
        scales: of the stages, full mode's last. The pipeline is called with the largest of them.

    Raises:
        ValueError: a scale below 1, or none above it.
    """
    most = max(scales, default=1.0)
    if most <= 1 or min(scales) < 1:
        raise ValueError(f"scales = {tuple(scales)}; legal: numbers >= 1, one of them above 1")
    return tuple((scale - 1) / (most - 1) for scale in scales)


@dataclass(frozen=True, kw_only=True)
class PPFlow(Method):
    """Configuration.

    Args:
        stages: of the coarse sizes, noisiest first: the noise level where the stage ends, and its
            patch in base patches (a number, or ``(t, h, w)``). Full mode has the rest.
        gains: guidance gain of each stage, full mode's last; 1 throughout by default. A stage with
            gain 0 leaves the guidance branch out.
        resize: how base weights start the new sizes; ``box`` in the paper's code.
        positions: of coarse tokens: ``centre`` of their groups, or ``corner``, the place of the
            top left token, as the authors' checkpoints have it.

    Raises:
        ValueError: stages that do not go down, sizes or gains out of range.
    """

    stages: tuple[Stage, ...] = TWO_LEVELS
    gains: tuple[float, ...] = ()
    resize: str = "box"
    positions: str = "centre"

    name = "ppflow"
    paper = "PPFlow, arXiv 2506.23543"
    recipes = ("stages",)
    conditions = True

    @checked_fields
    def __post_init__(self) -> None:
        stages = tuple((end, tuple(k) if isinstance(k, list) else k) for end, k in self.stages)
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "gains", tuple(self.gains) or (1.0,) * (len(stages) + 1))
        ends = [1.0, *(end for end, _ in stages), 0.0]
        falling = all(above > below for above, below in zip(ends, ends[1:], strict=False))
        sizes = [k for _, k in stages]
        if not stages or not falling or not all(legal_scale(k) for k in sizes):
            raise ValueError(
                f"stages = {self.stages}; legal: at least one, each the noise level where it ends "
                "(falling, between 1 and 0) and a patch: a whole number >= 2 or three whole "
                "numbers (t, h, w) >= 1, not all 1"
            )
        if len({Mode(k) for k in sizes}) < len(sizes):
            raise ValueError(f"stages = {self.stages}; legal: a size of its own for each")
        if self.resize not in RESIZES:
            raise ValueError(f"resize = {self.resize!r}; legal: {', '.join(RESIZES)}")
        one_of("positions", self.positions, POSITIONS)
        if len(self.gains) != len(stages) + 1 or not all(g >= 0 for g in self.gains):
            raise ValueError(
                f"gains = {self.gains}; legal: {len(stages) + 1} numbers >= 0, one per stage and "
                "one for full mode"
            )

    @property
    def modes(self) -> tuple[Mode, ...]:
        return tuple(Mode(k) for _, k in self.stages)

    @property
    def low_rank(self) -> int:
        return 0

    @property
    def trains_base(self) -> bool:
        return True

    @property
    def default_schedule(self) -> Schedule:
        ends = [1.0, *(end for end, _ in self.stages), 0.0]
        modes = (*self.modes, FULL)
        return Schedule(
            Segment(start=above, stop=below, mode=mode, gain=gain)
            for above, below, mode, gain in zip(ends, ends[1:], modes, self.gains, strict=False)
        )

    def build(self, model: nn.Module, backbone: Backbone) -> NewModules:
        if self.positions == "corner" and not backbone.corners:
            raise ValueError(
                f"positions = 'corner'; legal for {backbone.model_class}: 'centre' (its positions "
                "are not a table that the patch embedding adds)"
            )
        return StageProjections(self, model, backbone)

    def to_config(self) -> dict[str, Any]:
        config = asdict(self)
        if self.positions == "centre":  # adapters and calibrations of before it could be chosen
            del config["positions"]
        return config


class StageProjections(OwnProjections):
    """Own projections, and a level marker for the conditioning vector."""

    def __init__(self, method: PPFlow, model: nn.Module, backbone: Backbone) -> None:
        super().__init__(method.modes, method.resize, model, backbone)
        self.at_corners = method.positions == "corner"
        kernel, _ = backbone.patches.kernel(model)
        self.level_embeds = nn.ParameterDict()
        for mode in method.modes:
            self.level_embeds[mode.name] = nn.Parameter(0.02 * torch.randn(len(kernel)).to(kernel))

    @property
    def corners(self) -> bool:
        return self.at_corners

    def condition(self, vector: Tensor, mode: Mode) -> Tensor:
        if mode.is_full:
            return vector
        return vector + self.level_embeds[mode.name].to(vector.dtype)
