"""The search for DDiT's threshold: a budget becomes a ``tau`` by way of recorded runs.

A run with ``tau=0`` stays in full mode and records the statistic of every step; which modes another
threshold would have chosen follows without running anything (`traced`). The cost falls as the
threshold rises, so the one for a budget is found by halving (`calibrated`). Coarse steps change the
latents that later choices look at, so it is then tried in runs that use it (`settled`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ditdial.plain.checks import require
from ditdial.plan.ddit import DDiTController, DDiTRun
from ditdial.plan.facts import Facts
from ditdial.plan.frontier import legal_shares

UNREACHED = 0.005
"""Share of the full cost that the cheapest threshold may take beyond the budget."""

Trace = Sequence[dict[str, Any]]
"""What led to the mode of each step of one picture, as reports have it in ``why``."""


def traced(controller: DDiTController, trace: Trace, facts: Facts) -> float:
    """Share of the full cost that a picture would take by the statistics of a recorded run.

    Args:
        trace: the statistic of each mode by name at each call.
        facts: of the run.
    """
    run = DDiTRun(controller, facts)
    total = 0.0
    for level, why in zip(facts.levels, trace, strict=True):
        found = why.get("statistic") or {}
        total += run.replay(level, {m: found[m.name] for m in controller.coarse if found})
    return total / len(facts.levels)


def calibrated(
    controller: DDiTController,
    budget: float,
    traces: Iterable[Trace],
    facts: Facts,
) -> DDiTController:
    """The same controller with the threshold whose mean cost over recorded runs is the budget.

    Args:
        budget: share of the full cost.
        traces: of pictures run with ``tau=0``, which records their statistics in full mode.
        facts: of those runs.

    Raises:
        ValueError: no traces, or a budget that no threshold of these settings reaches.
    """
    traces = [list(trace) for trace in traces]
    require(bool(traces), "number of traces", 0, ">= 1")
    found = {
        value for trace in traces for why in trace for value in (why["statistic"] or {}).values()
    }
    candidates = sorted(found)  # a threshold only matters between two of them
    bare = replace(controller, cap=None, account=None)

    def mean(tau: float) -> float:
        at = replace(bare, tau=tau)
        return sum(traced(at, trace, facts) for trace in traces) / len(traces)

    taus = [0.0, *(value * (1 + 1e-6) for value in candidates)]
    least = mean(taus[-1])
    if not least - UNREACHED <= budget <= 1:
        raise ValueError(f"budget = {budget}; legal: {legal_shares(least, 'every choice coarse')}")
    low, high = 0, len(taus) - 1  # the cost falls with the threshold
    while low < high:
        middle = (low + high) // 2
        if mean(taus[middle]) <= budget:
            high = middle
        else:
            low = middle + 1
    return replace(controller, tau=taus[high])


def settled(
    controller: DDiTController,
    budget: float,
    record: Callable[[DDiTController], Sequence[Trace]],
    facts: Facts,
    *,
    rounds: int = 4,
) -> DDiTController:
    """`calibrated` to runs that really use the threshold, a few times over.

    Coarse steps leave rougher latents than full ones do, so that a threshold found on full runs
    alone is too small for a small budget.

    Args:
        record: runs some pictures with a controller and returns their traces.
        rounds: how often, after one of full runs.

    Raises:
        ValueError: as `calibrated`, or no rounds.
    """
    require(rounds >= 1, "rounds", rounds, ">= 1")
    low, high, found = 0.0, float("inf"), {}
    bare = calibrated(controller, budget, record(replace(controller, tau=0.0)), facts)
    bare = replace(bare, cap=None, account=None)
    for _ in range(rounds):
        traces = record(bare)
        cost = sum(traced(bare, trace, facts) for trace in traces) / len(traces)
        found[bare.tau] = cost
        if cost > budget:
            low = max(low, bare.tau)
        else:
            high = min(high, bare.tau)
        tau = calibrated(bare, budget, traces, facts).tau
        if not low < tau < high:  # it went to and fro: halve the way instead
            tau = 2 * low if high == float("inf") else (low * high) ** 0.5 or high / 2
        bare = replace(bare, tau=tau)
    best = min(found, key=lambda tau: abs(found[tau] - budget))
    return replace(controller, tau=best)
