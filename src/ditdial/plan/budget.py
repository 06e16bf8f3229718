"""A budget, and the choices that it is usually spent on.

`ditdial.plan.frontier` finds the best way to spend it; where nothing was measured,
`ditdial.plan.weak_first` is what remains.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ditdial.plain.checks import did_you_mean, one_of
from ditdial.plain.kinds import checked_fields
from ditdial.plan.choice import WEAK_GUIDANCE_GAIN, Choice
from ditdial.plan.mode import FULL, Mode, coarseness

CURRENCIES = ("flops", "seconds")
CRITERIA = ("path", "picture")


@dataclass(frozen=True)
class Budget:
    """What a run may take.

    Args:
        share: of what the same run takes in full mode, in (0, 1].
        currency: ``flops``, or ``seconds`` as measured on the device of the run.
        criterion: what makes a plan good: ``path`` (how far the sampling path leaves that of the
            calibration's reference, usually the full model) or ``picture`` (how far the final
            latents do, if that was measured).

    Raises:
        ValueError: a value out of range.
    """

    share: float
    currency: str = "flops"
    criterion: str = field(default="path", kw_only=True)

    @checked_fields
    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"budget = {self.share}; legal: (0, 1]")
        one_of("currency", self.currency, CURRENCIES)
        one_of("criterion", self.criterion, CRITERIA)


def pairings(modes: Iterable[Mode], guidance: str = "cfg") -> tuple[Choice, ...]:
    """The usual choices for a set of modes; the first one is a calibration's usual reference.

    Args:
        modes: full mode and the coarse ones.
        guidance: ``cfg``: every mode with itself and with each coarser one as its guide, full mode
            first. ``weak``: the coarsest mode guides on the true condition, with FlexiDiT's gain;
            where it runs both branches, guidance is ordinary. ``both``: those of ``cfg``, then
            every mode with each coarser one as its guide on the true condition, for a calibration
            whose reference changes from one kind of guidance to the other.

    Raises:
        ValueError: guidance out of range, or weak guidance without a coarse mode.
    """
    known = sorted(set(modes) | {FULL}, key=coarseness)
    kinds = ("cfg", "weak", "both")
    if guidance not in kinds or (guidance != "cfg" and len(known) < 2):
        near = "" if guidance in kinds else did_you_mean(guidance, kinds)
        raise ValueError(
            f"guidance = {guidance!r} with modes {', '.join(mode.name for mode in known)}; legal: "
            f"'cfg', or 'weak' and 'both' with at least one coarse mode{near}"
        )
    ordinary = tuple(
        Choice(mode=mode, guide=None if guide == mode else guide)
        for mode in known
        for guide in known
        if guide == mode or guide.is_coarser_than(mode)
    )
    if guidance == "cfg":
        return ordinary
    if guidance == "both":
        pairs = (choice for choice in ordinary if choice.guide is not None)
        weak_too = (replace(pair, guidance="weak", gain=WEAK_GUIDANCE_GAIN) for pair in pairs)
        return (*ordinary, *weak_too)
    weak = known[-1]
    finer = (mode for mode in known if weak.is_coarser_than(mode))
    guided = (
        Choice(mode=mode, guide=weak, guidance="weak", gain=WEAK_GUIDANCE_GAIN) for mode in finer
    )
    return (*guided, Choice(mode=weak))
