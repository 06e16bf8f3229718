"""DDiT's choice of the patch size from each latent's own trajectory (2602.16968).

The latents of the last four calls give an estimate of the third derivative along the noise level;
where it is quiet inside blocks of a patch, that patch is large enough:

    s(k) = quantile_rho over blocks of std(z''' inside k x k base patches),  mode = largest k with
    s(k) < tau

The choice is made for each picture by itself. A derivative, rather than the paper's difference,
lets one threshold hold for any step count; it is found for a budget (`ditdial.plan.threshold`), not
copied. A cap and an account turn the threshold into a promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditdial.ops.differences import derivative, roughness
from ditdial.plain.checks import one_of, require
from ditdial.plain.kinds import check_kind, checked_fields
from ditdial.plan.choice import Choice
from ditdial.plan.controller import Controller, Decision, Run
from ditdial.plan.facts import Facts
from ditdial.plan.frontier import legal_shares
from ditdial.plan.mode import FULL, Mode

SIGNALS = ("latent", "clean")
TOLERANCE = 1e-9
"""Relative rounding error that a cap forgives itself."""


class Account:
    """Shares an average budget between pictures, over batches and runs: easy ones pay for hard.

    At the end of every run the sum spent is at most ``share`` of what all pictures so far would
    have cost in full mode; what was saved is carried on to the next run.

    Args:
        share: of the full cost, in (0, 1].

    Raises:
        ValueError: a share outside (0, 1].
    """

    def __init__(self, share: float) -> None:
        check_kind("share", share, float)
        require(0 < share <= 1, "share", share, "(0, 1]")
        self.share, self.full, self.spent = share, 0.0, 0.0

    def allowance(self, full: float) -> float:
        """What a run may spend that would cost ``full`` in full mode."""
        return self.share * (self.full + full) - self.spent

    def book(self, full: float, spent: float) -> None:
        """Enter what a step of a run cost, and what it would have cost in full mode."""
        self.full += full
        self.spent += spent


@dataclass(frozen=True, kw_only=True)
class DDiTController(Controller):
    """Chooses each picture's patch size by how its latents change; the first two arguments matter.

    Args:
        tau: threshold of the statistic; larger is faster. It belongs to one latent space and model:
            `ditdial.plan.threshold` finds it for a budget. 0 keeps full mode and records the
            statistics.
        coarse: the modes to choose from beside full mode.
        rho: quantile over blocks; 0.4 in the paper.
        order: of the derivative; 3 in the paper. As many calls are needed before the first choice.
        start: mode of those calls; full mode in the paper.
        refine_only: never go back to a coarser mode in a run. Needs a coarse ``start``.
        fine_below: noise level below which full mode is forced.
        lowest: noise level below which a mode of ``coarse`` is never chosen, one for each; none by
            default. The statistic does not know at which levels a size was trained.
        signal: ``latent``, or ``clean`` to look at the predicted clean latents instead, whose
            derivative a stochastic sampler does not drown in its own noise.
        guide: mode of the guidance branch; that of the conditional branch unless given.
        guidance, gain: as in `Choice`.
        per_picture: choose for each picture by itself; otherwise all of a batch take the mode of
            the one that needs the finest.
        cap: share of its full cost that no picture ever exceeds.
        account: shares an average budget between pictures.

    Raises:
        ValueError: a value out of range.
    """

    tau: float
    coarse: tuple[Mode, ...] = (Mode(2), Mode(4))
    rho: float = 0.4
    order: int = 3
    start: Mode = FULL
    refine_only: bool = False
    fine_below: float = 0.0
    lowest: tuple[float, ...] = ()
    signal: str = "latent"
    guide: Mode | None = None
    guidance: str = "cfg"
    gain: float = 1.0
    per_picture: bool = True
    cap: float | None = None
    account: Account | None = None

    @checked_fields
    def __post_init__(self) -> None:
        require(0 <= self.tau < float("inf"), "tau", self.tau, "a number >= 0")
        require(0 <= self.rho <= 1, "rho", self.rho, "[0, 1]")
        whole = type(self.order) is int and 1 <= self.order <= 6
        require(whole, "order", self.order, "a whole number from 1 to 6")
        names = [mode.name for mode in self.coarse]
        legal = bool(names) and FULL not in self.coarse and len(set(names)) == len(names)
        require(legal, "coarse", names, "at least one coarse mode, all different")
        known = self.start in self.modes
        require(known, "start", self.start.name, ", ".join(["full", *names]))
        require(0 <= self.fine_below < 1, "fine_below", self.fine_below, "[0, 1)")
        fits = not self.lowest or len(self.lowest) == len(self.coarse)
        legal = f"{len(self.coarse)} noise levels in [0, 1], or none"
        require(fits and all(0 <= x <= 1 for x in self.lowest), "lowest", self.lowest, legal)
        one_of("signal", self.signal, SIGNALS)
        self.choice(self.start)  # refuses guidance and gain
        fits = self.cap is None or 0 < self.cap <= 1
        require(fits, "cap", self.cap, "(0, 1], or None")
        if self.refine_only:
            require(not self.start.is_full, "start", self.start.name, "coarse, with refine_only")

    @property
    def modes(self) -> set[Mode]:
        """Full mode, the coarse ones, and that of the guidance branch."""
        guide = set() if self.guide is None else {self.guide}
        return {FULL, *self.coarse} | guide

    def choice(self, mode: Mode) -> Choice:
        """A step whose conditional branch runs in a mode."""
        return Choice(mode=mode, guide=self.guide, guidance=self.guidance, gain=self.gain)

    def begin(self, facts: Facts) -> DDiTRun:
        """Start a run.

        Raises:
            ValueError: fewer steps than the first choice needs, a cap or an account below the
                cheapest run, or without known steps.
        """
        return DDiTRun(self, facts)


class DDiTRun(Run):
    """The latents of one run's last calls, and what the run has spent.

    Costs are counted in full calls: 1 is what both branches take in full mode.
    """

    def __init__(self, controller: DDiTController, facts: Facts) -> None:
        self.controller, self.facts = controller, facts
        self.learns = controller.signal == "clean"
        # The clean latent of a call is only known after it.
        self.warmup = controller.order + self.learns
        if facts.levels and len(set(facts.levels)) <= self.warmup:
            raise ValueError(
                f"{len(facts.levels)} steps; legal with order = {controller.order}: more than "
                f"{self.warmup}, the history that the first choice needs"
            )
        costs = {mode: facts.cost(controller.choice(mode)) for mode in controller.modes}
        self.by_cost = sorted({FULL, *controller.coarse}, key=costs.__getitem__)
        self.full = facts.macs(FULL, None) * (1 if facts.guided is False else 2)
        self.shares = {mode: costs[mode] / self.full for mode in self.by_cost}
        lowest = controller.lowest or (0.0,) * len(controller.coarse)
        pairs = zip(controller.coarse, lowest, strict=True)
        self.lows = {mode: max(low, controller.fine_below) for mode, low in pairs}
        self.history: list[tuple[float, Tensor]] = []
        self.step = 0
        self.spent: Tensor | None = None
        self.allowance = float("inf")  # what the account leaves this run, in full calls
        self.last: list[Mode] = []
        self.promised = controller.cap is not None or controller.account is not None
        if self.promised:
            self._check_promise()

    def _check_promise(self) -> None:
        controller, levels = self.controller, self.facts.levels
        if not levels:
            raise ValueError(
                "a cap and an account need the number of steps before the run, which a bare model "
                "does not tell; legal: a pipeline with a scheduler, or neither of them"
            )
        shares = {"cap": controller.cap}
        if controller.account is not None:
            shares["account.share"] = controller.account.share
        least = self._least(0, None) / len(levels)
        for name, share in shares.items():
            if share is not None and share < least * (1 - TOLERANCE):
                what = f"the cheapest these settings allow in {len(levels)} steps"
                raise ValueError(f"{name} = {share}; legal: {legal_shares(least, what)}")

    def _allowed(self, level: float) -> list[Mode]:
        """The modes that the settings allow at a noise level, cheapest first."""
        return [mode for mode in self.by_cost if level >= self.lows.get(mode, 0.0)]

    def _cheapest(self, step: int, last: Mode | None) -> Mode:
        """The cheapest mode that the settings allow a step, whatever the latents say."""
        allowed = self._allowed(self.facts.levels[step] if self.facts.levels else 1.0)
        at_least = self.by_cost[0]
        if step < self.warmup:
            at_least = self.controller.start
        elif self.controller.refine_only and last is not None:
            at_least = last
        return next(m for m in allowed if self.shares[m] >= self.shares[at_least])

    def _least(self, step: int, last: Mode | None) -> float:
        """Least cost of the steps from this one on, in full calls."""
        total = 0.0
        for later in range(step, len(self.facts.levels)):
            last = self._cheapest(later, last)
            total += self.shares[last]
        return total

    def decide(self, level: float, latents: Tensor) -> Sequence[Decision]:
        """Each picture's mode: what its latents ask for, as far as cap and account can pay it."""
        controller, count = self.controller, len(latents)
        if self.spent is None:
            self.spent = torch.zeros(count, dtype=torch.float64)
            if controller.account is not None:
                whole = count * self.full * len(self.facts.levels)
                self.allowance = controller.account.allowance(whole) / self.full
        if controller.signal == "latent":
            self._remember(level, latents)
        statistics = self._statistics(count)
        wanted = [self._wanted(level, i, s) for i, s in enumerate(statistics)]
        if not controller.per_picture:
            wanted = [max(wanted, key=self.shares.__getitem__)] * count
        allowed = self._afford(wanted, statistics) if self.promised else wanted
        if not controller.per_picture:  # one that cannot be paid for all is paid for none
            allowed = [min(allowed, key=self.shares.__getitem__)] * count
        self.last, self.step = allowed, self.step + 1
        for i, mode in enumerate(allowed):
            self.spent[i] += self.shares[mode]
        if controller.account is not None:
            spent = sum(self.shares[mode] for mode in allowed)
            self.allowance -= spent
            controller.account.book(count * self.full, spent * self.full)
        return [
            Decision(choice=controller.choice(mode), why=self._why(statistic, want, mode))
            for mode, want, statistic in zip(allowed, wanted, statistics, strict=True)
        ]

    def replay(self, level: float, statistic: dict[Mode, float]) -> float:
        """A step of a lone picture whose statistic was recorded, without cap or account.

        Returns:
            Share that the step takes of a full call.
        """
        mode = self._wanted(level, 0, statistic)
        self.last, self.step = [mode], self.step + 1
        return self.shares[mode]

    def learn(self, level: float, clean: Tensor) -> None:
        """Keep a predicted clean latent for the choices that follow."""
        self._remember(level, clean)

    def _remember(self, level: float, x: Tensor) -> None:
        x = x.detach()
        if self.history and self.history[-1][0] == level:  # a solver's second look at a level
            self.history.pop()
        self.history = [*self.history[-self.controller.order :], (level, x)]

    def _statistics(self, count: int) -> list[dict[Mode, float]]:
        """Of each picture, the statistic of each coarse mode; empty until there is history."""
        if len(self.history) <= self.controller.order:
            return [{} for _ in range(count)]
        levels, values = zip(*self.history, strict=True)
        size = values[-1].flatten(1).float().square().mean(dim=1).sqrt()
        moved = derivative(values, levels) / size.view(-1, *[1] * (values[-1].ndim - 1))
        found = {
            mode: roughness(moved, mode.covers, self.controller.rho).tolist()
            for mode in self.controller.coarse
        }
        return [{mode: values[i] for mode, values in found.items()} for i in range(count)]

    def _wanted(self, level: float, picture: int, statistic: dict[Mode, float]) -> Mode:
        """The cheapest mode that is quiet enough, by the settings and the latents alone."""
        controller, allowed = self.controller, self._allowed(level)
        if not statistic:
            at_least = controller.start
        else:
            quiet = [m for m in allowed if not m.is_full and statistic[m] < controller.tau]
            at_least = quiet[0] if quiet else FULL
            if controller.refine_only:
                at_least = max(at_least, self.last[picture], key=self.shares.__getitem__)
        return next(m for m in allowed if self.shares[m] >= self.shares[at_least])

    def _afford(self, wanted: list[Mode], statistics: list[dict[Mode, float]]) -> list[Mode]:
        """The modes that the cap and the account can pay, none of them dearer than the wanted one.

        Every picture starts from the cheapest mode that the settings allow it. What the account has
        left beyond that is given out picture by picture. The picture whose latents change fastest
        comes first, because a coarse patch would lose the most of it.
        """
        modes = [self._cheapest(self.step, last) for last in self.last or [None] * len(wanted)]
        spare = self.allowance - sum(self._to_the_end(mode) for mode in modes)
        changes = [max(statistic.values(), default=0.0) for statistic in statistics]
        for i in sorted(range(len(wanted)), key=lambda i: -changes[i]):
            own = self._own_allowance(i)
            planned = self._to_the_end(modes[i])
            for mode in self._from_dearest(wanted[i], modes[i]):
                whole = self._to_the_end(mode)
                if whole <= own and whole - planned <= spare + TOLERANCE:
                    modes[i], spare = mode, spare - (whole - planned)
                    break
        return modes

    def _to_the_end(self, mode: Mode) -> float:
        """Cost of this step in a mode and of the cheapest way on from there, in full calls."""
        return self.shares[mode] + self._least(self.step + 1, mode)

    def _own_allowance(self, picture: int) -> float:
        """What the cap leaves a picture for this step and all that follow, in full calls."""
        cap, steps = self.controller.cap, len(self.facts.levels)
        if cap is None:
            return float("inf")
        assert self.spent is not None
        return cap * steps - self.spent[picture].item() + TOLERANCE * steps

    def _from_dearest(self, most: Mode, least: Mode) -> list[Mode]:
        """The modes allowed at this step that cost at most ``most`` and at least ``least``."""
        low, high = self.shares[least], self.shares[most]
        allowed = self._allowed(self.facts.levels[self.step])
        return [mode for mode in reversed(allowed) if low <= self.shares[mode] <= high]

    def _why(self, statistic: dict[Mode, float], wanted: Mode, mode: Mode) -> dict[str, Any]:
        found = {each.name: value for each, value in statistic.items()}
        why: dict[str, Any] = {"statistic": found or None, "tau": self.controller.tau}
        return why if wanted == mode else {**why, "wanted": wanted.name}
