"""A budget, and the best way to spend it: one choice per step, exactly, for every budget at once.

Where the damage of a plan is the sum over its steps, the best plan for a budget is a
multiple-choice knapsack. `Frontier.of` solves it by dynamic programming over labels (cost, damage):
after each step only those stay that no cheaper label beats, and each remembers where it came from.
Without a calibration there is no damage to weigh, and FlexiDiT's one-parameter dial remains: weak
first.

Shape legend: S steps, K choices, P plans on the frontier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elastic_dit.mode import FULL, Mode, coarseness
from elastic_dit.schedule import WEAK_GUIDANCE_GAIN, Schedule, Segment

CURRENCIES = ("flops", "seconds")
CRITERIA = ("path", "picture")

RESOLUTION = 1e-9
"""Costs that agree to this share of the full cost count as one, or rounding would multiply them."""

ROUNDING = 1e-12
"""Share of the full cost by which sums of the same numbers in another order may differ."""


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

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"budget = {self.share}; legal: (0, 1]")
        for name, legal in (("currency", CURRENCIES), ("criterion", CRITERIA)):
            value = getattr(self, name)
            if value not in legal:
                raise ValueError(f"{name} = {value!r}; legal: {', '.join(map(repr, legal))}")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How one step runs: a `Segment` without noise levels, with the same arguments.

    Raises:
        ValueError: guidance or gain out of range.
    """

    mode: Mode = FULL
    guide: Mode | None = None
    guidance: str = "cfg"
    gain: float = 1.0

    def __post_init__(self) -> None:
        self.segment(1, 0)

    @classmethod
    def of(cls, segment: Segment) -> Choice:
        """The choice that a segment makes."""
        return cls(
            mode=segment.mode, guide=segment.guide, guidance=segment.guidance, gain=segment.gain
        )

    def runs_as(self, segment: Segment) -> bool:
        """Whether a segment runs its steps just so, however it is written down."""
        own, facts = self.segment(1, 0), ("mode", "guide_mode", "weak_guidance", "gain")
        return all(getattr(own, name) == getattr(segment, name) for name in facts)

    def segment(self, start: float, stop: float) -> Segment:
        """This choice for a stretch of noise levels."""
        return Segment(
            start=start,
            stop=stop,
            mode=self.mode,
            guide=self.guide,
            guidance=self.guidance,
            gain=self.gain,
        )

    @property
    def name(self) -> str:
        """``patch2/patch4`` for modes of the conditional and the guidance branch.

        What is not plain CFG is added: ``full/patch2 weak 0.4`` is weak guidance with that gain.
        """
        own = self.segment(1, 0)
        name = f"{own.mode.name}/{own.guide_mode.name}"
        if own.gain == 1 and not own.weak_guidance:
            return name
        return f"{name} {'weak' if own.weak_guidance else 'cfg'} {own.gain:g}"


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
    if guidance not in ("cfg", "weak", "both") or (guidance != "cfg" and len(known) < 2):
        raise ValueError(
            f"guidance = {guidance!r} with modes {', '.join(mode.name for mode in known)}; legal: "
            "'cfg', or 'weak' and 'both' with at least one coarse mode"
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


@dataclass(frozen=True, eq=False)
class Frontier:
    """Every plan that no cheaper plan equals, cheapest first.

    Attributes:
        costs, damages: of the plans, ``(P,)``; costs rise and damages fall.
    """

    costs: NDArray[np.float64]
    damages: NDArray[np.float64]
    _back: tuple[tuple[NDArray[np.int32], NDArray[np.int16]], ...] = field(repr=False)

    @classmethod
    def of(cls, damage_SK: ArrayLike, cost_SK: ArrayLike, *, limit: float = math.inf) -> Frontier:
        """Solve for every budget up to a limit.

        Args:
            damage_SK: what each choice does at each step, ``(S, K)``.
            cost_SK: what it costs there as a share of the full run, ``(S, K)`` or ``(K,)``.
            limit: plans that cost more are left out.

        Raises:
            ValueError: shapes that do not fit, numbers that are negative or not finite, or a limit
                below the cheapest plan.
        """
        damage_SK = np.asarray(damage_SK, dtype=np.float64)
        if damage_SK.ndim != 2 or not damage_SK.size:
            raise ValueError(f"damage has shape {damage_SK.shape}; legal: (steps, choices)")
        cost_SK = np.broadcast_to(np.asarray(cost_SK, dtype=np.float64), damage_SK.shape)
        for name, values in (("damage", damage_SK), ("cost", cost_SK)):
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ValueError(f"{name} goes from {values.min()} to {values.max()}; legal: >= 0")
        least = cost_SK.min(axis=1)
        if least.sum() > limit + ROUNDING:
            raise ValueError(
                f"budget = {limit}; legal: {_up(least.sum())} (the cheapest choice throughout) to 1"
            )
        ahead = np.append(least[::-1].cumsum()[::-1][1:], 0.0)
        costs, damages, back = np.zeros(1), np.zeros(1), []
        for step in range(len(damage_SK)):
            # Choice by choice, so that the costs are K sorted runs, which a stable sort merges.
            cost = (cost_SK[step][:, None] + costs).ravel()
            damage = (damage_SK[step][:, None] + damages).ravel()
            kept = _undominated(cost, damage, limit + 2 * ROUNDING - ahead[step])
            back.append(
                ((kept % len(costs)).astype(np.int32), (kept // len(costs)).astype(np.int16))
            )
            costs, damages = cost[kept], damage[kept]
        return cls(costs, damages, tuple(back))

    def __len__(self) -> int:
        return len(self.costs)

    def best(self, budget: float) -> int:
        """Index of the plan with the least damage within a budget.

        Raises:
            ValueError: a budget below the cheapest plan.
        """
        index = int(np.searchsorted(self.costs, budget + 2 * ROUNDING, side="right")) - 1
        if index < 0:
            raise ValueError(
                f"budget = {budget}; legal: {_up(self.costs[0])} (the cheapest choice throughout) "
                "to 1"
            )
        return index

    def choices(self, index: int) -> NDArray[np.intp]:
        """The choice of each step of a plan, ``(S,)``."""
        found = []
        for parents, choices in reversed(self._back):
            found.append(choices[index])
            index = parents[index]
        return np.array(found[::-1], dtype=np.intp)


def _undominated(cost: NDArray, damage: NDArray, limit: float) -> NDArray[np.intp]:
    """Indices of the labels within a limit that no cheaper one equals, cheapest first."""
    within = np.flatnonzero(cost <= limit)
    order = within[np.argsort(cost[within], kind="stable")]
    lowest = np.minimum.accumulate(damage[order])
    better = np.append(True, damage[order][1:] < lowest[:-1])
    kept = order[better]
    # Of costs that only rounding tells apart, the last one has the least damage.
    key = np.rint(cost[kept] / RESOLUTION)
    return kept[np.append(key[1:] != key[:-1], True)]


def _up(cost: float) -> float:
    """A cost as it is told: never rounded below what is legal."""
    return math.ceil(cost * 1e4 - 1e-6) / 1e4


def weak_first_for_budget(
    budget: float, macs: Callable[[Mode, float | None], float], modes: Iterable[Mode]
) -> Schedule:
    """The weak-first schedule that costs ``budget`` times as much as full mode.

    Timesteps are taken to be evenly spaced. The finest coarse mode that reaches the budget is used.

    Args:
        budget: share of the full cost, in (0, 1].
        macs: multiply-adds of one forward pass in a mode at a noise level (None: in the mean).
        modes: the coarse modes at hand.

    Raises:
        ValueError: a budget outside (0, 1], or below what the cheapest mode costs.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget = {budget}; legal: (0, 1]")
    if budget == 1:
        return Schedule.constant(FULL)
    ratios = {mode: macs(mode, None) / macs(FULL, None) for mode in modes}
    reachable = [mode for mode, ratio in ratios.items() if ratio <= budget]
    if not reachable:
        cheapest = min(ratios.values(), default=1.0)
        raise ValueError(
            f"budget = {budget}; legal: {cheapest:.3f} (the cheapest mode throughout) to 1"
        )
    weak = max(reachable, key=lambda mode: ratios[mode])
    return Schedule.weak_first(min(1.0, (1 - budget) / (1 - ratios[weak])), weak)
