"""Time runs against each other: in turn, many rounds, as ratios.

Machines are noisy and their clocks drift, so what is compared runs interleaved, in rotating order,
and the figure is the median of the per-round ratios. Absolute seconds are worth keeping on a GPU
only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from elastic_dit.checks import require


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
    runs: dict[str, Callable[[], object]], *, rounds: int = 9, warmup: int = 2
) -> dict[str, Timing]:
    """Time several runs in turn.

    Args:
        runs: what to time, by name; on CUDA each is followed by a synchronisation.
        rounds: measured rounds; each runs everything once, starting one further each time.
        warmup: rounds before that are not measured.

    Raises:
        ValueError: no runs, or no rounds.
    """
    require(len(runs) >= 1, "number of runs", len(runs), ">= 1")
    require(rounds >= 1, "rounds", rounds, ">= 1")
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            runs[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def peak_memory(run: Callable[[], object]) -> int | None:
    """Peak bytes that CUDA had allocated during a run; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
