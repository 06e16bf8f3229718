"""The reference of a calibration: the run that is meant, which errors are differences to.

It may be one choice throughout, such as the base with full guidance, or another at each noise
level; the theory of the damage (`ditdial.plan.damage`) asks nothing of it. That matters where kinds
of guidance are mixed. Weak-model guidance aims at other pictures than ordinary guidance does;
measured against the latter it is charged for the distance of the two aims, which no error of any
mode has made. The reference says which aim is meant where.
"""

from __future__ import annotations

from collections.abc import Sequence

from ditdial.plan.choice import Choice
from ditdial.plan.schedule import Schedule, Segment


def as_choices(reference: Schedule | None, choices: Sequence[Choice]) -> Schedule:
    """A reference in the words of the choices, in as few stretches as it takes.

    Args:
        reference: None for the first choice throughout.

    Raises:
        ValueError: a schedule that somewhere is none of the choices.
    """
    if reference is None:
        return Schedule.throughout(choices[0])
    segments: list[Segment] = []
    for segment in reference.segments:
        choice = next((choice for choice in choices if choice.runs_as(segment)), None)
        if choice is None:
            raise ValueError(
                f"reference = {segment.name!r} from noise level {segment.start} to "
                f"{segment.stop}; legal: one of the choices "
                f"({', '.join(repr(choice.name) for choice in choices)})"
            )
        start = segment.start
        if segments and segments[-1].choice == choice:
            start = segments.pop().start
        segments.append(Segment.of(choice, start, segment.stop))
    return Schedule(segments)


def check_stretches(reference: Schedule, levels: Sequence[float]) -> None:
    """Refuse a reference that was not measured throughout.

    Raises:
        ValueError: a stretch of it without any of the levels.
    """
    for stretch in reference.segments:
        if not any(reference.at(level) is stretch for level in levels):
            raise ValueError(
                f"reference = {stretch.name!r} from noise level {stretch.start} to "
                f"{stretch.stop}, where nothing was measured; legal: stretches with at least one "
                f"of the levels {', '.join(f'{level:.3g}' for level in levels)}"
            )
