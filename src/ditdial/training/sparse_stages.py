"""How SparseDiT is trained (2412.06028, section 3.4): one stage of noise levels per micro-batch.

A batch has one number of tokens, so a step on a device draws one stage, as likely as its noise
levels are, and levels from that stage only. Over steps and devices levels are distributed as ever.

The paper's text names the base's own objective alone; its published trainer weights it by min-SNR
with gamma 5, which is an option here. So is a dense teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditdial.methods.sparsedit import SparseDiT
from ditdial.ops.flow import level_quantile, level_share, min_snr_weight
from ditdial.plain.checks import require
from ditdial.plan.mode import Mode
from ditdial.training.objectives import NoisyBatch


@dataclass(frozen=True, kw_only=True)
class SparseSettings:
    """Of ``method = "sparsedit"`` in table ``[adapter]``; its stages are ``stage_ends`` and
    ``stage_modes`` (``grid4``, ``grid8x6``), and full mode has what they leave.

    Args:
        pool, modules, group, top: the plan of the blocks (see `ditdial.SparseDiT`).
        upsample: how sparse tokens are spread.
        random_grids: draw the grid of a step from all stages' and its levels from all, so that any
            grid may be used at any level.
        min_snr_gamma: weight levels by ``min(SNR, gamma) / (SNR + 1)``; 0 for all alike.
    """

    pool: int = 1
    modules: int = 1
    group: list[int] = field(default_factory=lambda: [1, 1, 1, 1])
    top: int = 1
    upsample: str = "bilinear"
    random_grids: bool = False
    min_snr_gamma: float = 0.0

    def __post_init__(self) -> None:
        require(self.min_snr_gamma >= 0, "adapter.min_snr_gamma", self.min_snr_gamma, ">= 0")

    def sparsedit(self, ends: list[float], modes: list[str], recipe: str, rank: int) -> SparseDiT:
        """The method with these settings.

        Raises:
            ValueError: a value out of its range.
        """
        grids = [Mode.parse(name) for name in modes]
        bad = [mode.name for mode in grids if mode != Mode(token_grid=mode.token_grid or 1)]
        require(not bad, "adapter.stage_modes", modes, "names of grids: gridK, gridHxW")
        sides = [mode.token_grid or (1, 1) for mode in grids]
        group = tuple(self.group)
        require(len(group) == 4, "adapter.group", self.group, "4 whole numbers")
        return SparseDiT(
            pool=self.pool,
            modules=self.modules,
            group=(group[0], group[1], group[2], group[3]),
            top=self.top,
            stages=tuple(zip(ends, sides, strict=True)),
            upsample=self.upsample,
            recipe=recipe,
            rank=rank,
        )


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What one step trains.

    Args:
        within: shares of the distribution of noise levels that the step's lie between.
    """

    mode: Mode
    within: tuple[float, float] = (0.0, 1.0)


def draw_stage(
    method: SparseDiT, generator: torch.Generator, *, mean: float, std: float, random_grids: bool
) -> Draw:
    """The mode and the levels of one step."""
    stages = method.default_schedule.segments
    # Where the base stays as it is, there is nothing to train in the full mode of the rest.
    lowest = 0.0 if method.trains_base else level_share(method.stages[-1][0], mean=mean, std=std)
    uniform = lowest + (1 - lowest) * torch.rand((), generator=generator).item()
    if random_grids:
        place = int(torch.rand((), generator=generator).item() * len(method.modes))
        return Draw(mode=method.modes[place], within=(lowest, 1.0))
    level = level_quantile(uniform, mean=mean, std=std)
    own = next((stage for stage in stages if level >= stage.stop), stages[-1])
    share = [level_share(edge, mean=mean, std=std) for edge in (own.stop, own.start)]
    return Draw(mode=own.mode, within=(share[0], share[1]))


def min_snr_weighted(error: Tensor, batch: NoisyBatch, gamma: float) -> Tensor:
    """Errors ``(B, C, H, W)``, each level weighted by min-SNR with ``gamma``; 0 for all alike."""
    if not gamma:
        return error
    return error * min_snr_weight(batch.level, gamma)[:, None, None, None]
