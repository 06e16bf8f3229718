"""Time runs against each other: in turn, many rounds, as ratios.

Machines are noisy and their clocks drift, so what is compared runs interleaved, in rotating order,
and the figure is the median of the per-round ratios. Where a process puts its arrays in memory
shifts such a ratio for as long as it lives (by up to a tenth on two cores, between two copies of
the very same model), so that small differences take several processes. Absolute seconds are worth
keeping on a GPU only.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import TypeVar

import torch

from ditdial.plain.checks import require

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """Seconds of one run in each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def ratio_to(self, baseline: Timing) -> float:
        """Median over the rounds of this run's seconds over the baseline's."""
        pairs = zip(self.seconds, baseline.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def interleave(
    runs: dict[str, Callable[[], object]],
    *,
    rounds: int = 9,
    warmup: int = 2,
    prepare: Callable[[str], object] | None = None,
) -> dict[str, Timing]:
    """Time several runs in turn.

    Args:
        runs: what to time, by name; on CUDA each is followed by a synchronisation.
        rounds: measured rounds; each runs everything once, starting one further each time.
        warmup: rounds before that are not measured.
        prepare: is called with a run's name before each time it runs, and is not timed.

    Raises:
        ValueError: no runs, or no rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number, name in _in_turn(list(runs), rounds, warmup):
        if prepare is not None:
            prepare(name)
        taken = _seconds(runs[name])
        if number >= 0:
            seconds[name].append(taken)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def beside(
    baseline: Callable[[], object],
    runs: dict[str, Callable[[], object]],
    *,
    rounds: int = 5,
    warmup: int = 1,
) -> dict[str, tuple[float, ...]]:
    """Time each run next to the baseline, for a machine whose speed changes within a round.

    Args:
        baseline: runs before every other run, or after it in every second round.
        runs, rounds, warmup: as in `interleave`.

    Returns:
        Of each run, its seconds over those of its own baseline in each round.

    Raises:
        ValueError: no runs, or no rounds.
    """
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for number, name in _in_turn(list(runs), rounds, warmup):
        if number % 2:
            taken = _seconds(runs[name])
            ratio = taken / _seconds(baseline)
        else:
            usual = _seconds(baseline)
            ratio = _seconds(runs[name]) / usual
        if number >= 0:
            ratios[name].append(ratio)
    return {name: tuple(values) for name, values in ratios.items()}


def _in_turn(names: list[str], rounds: int, warmup: int) -> Iterator[tuple[int, str]]:
    """Number of the round, negative while warming up, and whose turn it is."""
    require(len(names) >= 1, "number of runs", len(names), ">= 1")
    require(rounds >= 1, "rounds", rounds, ">= 1")
    for number in range(-warmup, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            yield number, name


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_fresh_processes(measure: Callable[[], Result], processes: int) -> Iterator[Result]:
    """Measure in one new process after the other.

    Args:
        measure: found by its name in the new process, as pickling does.
        processes: how many.

    Raises:
        ValueError: no processes.
    """
    require(processes >= 1, "processes", processes, ">= 1")
    context = multiprocessing.get_context("spawn")
    for _ in range(processes):
        with futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            yield pool.submit(measure).result()


def peak_memory(run: Callable[[], object]) -> int | None:
    """Peak bytes that CUDA had allocated during a run; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
