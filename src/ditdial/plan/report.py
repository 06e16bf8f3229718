"""What really ran: one record per model call, and their sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ditdial.plain import figures, json_files
from ditdial.plain.tables import Table
from ditdial.plan.mode import Mode

CACHES = "step caches are not counted: blocks that one skips cost here as if they ran"
"""What plans and reports say of their costs where a step cache is on."""


class Timed(Protocol):
    """What took time: a `ditdial.host.device.Stopwatch`, which is read only when asked."""

    @property
    def seconds(self) -> float:
        """Seconds that it took."""
        ...


@dataclass(frozen=True, kw_only=True)
class CallRecord:
    """One model call that was made.

    Args:
        mode: of the call, of its conditional branch if it held both; None where a guidance call
            only repeated the conditional prediction.
        guide: mode of the guidance branch in the same call, None if there was none.
        branch: what the pipeline called the branch, if it calls the model once per branch.
        macs, full_macs: multiply-adds of all rows, as run and as full mode would have cost.
        pictures: which of the batch ran in this mode, where not all of them did.
        why: what led to each of their modes, if a controller chose them.
        watch: knows the seconds of the call.
        guided: the rows hold both branches.
        cached: a step cache was on; blocks that it skipped are counted as if they had run.
    """

    level: float | None
    mode: Mode | None
    guide: Mode | None
    branch: str | None = None
    rows: int
    macs: float
    full_macs: float
    watch: Timed
    pictures: tuple[int, ...] | None = None
    why: tuple[dict[str, Any] | None, ...] = ()
    guided: bool = False
    cached: bool = False

    @property
    def passes(self) -> int:
        """Forward passes of each picture."""
        return 2 if self.guided else 1

    @property
    def count(self) -> int:
        """Pictures of the batch that ran in this call."""
        return self.rows // self.passes


@dataclass
class Trail:
    """One picture's way through a run, a line per step.

    Args:
        why: what led to each mode, if a controller chose it.
        macs, full_macs: multiply-adds of all its branches, as run and in full mode.
    """

    levels: list[float | None]
    modes: list[Mode | None]
    why: list[dict[str, Any] | None]
    macs: float
    full_macs: float

    @property
    def ratio(self) -> float:
        """Cost over that of the same calls in full mode."""
        return self.macs / self.full_macs if self.full_macs else 1.0


@dataclass(frozen=True)
class Report:
    """The calls of one run.

    Args:
        budget: the share of the full cost that it was allowed, if it was planned for one.
    """

    calls: tuple[CallRecord, ...]
    budget: float | None = None

    @property
    def macs(self) -> float:
        """Multiply-adds of the run."""
        return sum(call.macs for call in self.calls)

    @property
    def ratio(self) -> float:
        """Cost over that of the same calls in full mode; 1 for an empty run."""
        full = sum(call.full_macs for call in self.calls)
        return self.macs / full if full else 1.0

    @property
    def cached(self) -> bool:
        """Whether a step cache was on in any of the calls, of which costs know nothing."""
        return any(call.cached for call in self.calls)

    @property
    def seconds(self) -> float:
        """Seconds inside the model."""
        return sum(call.watch.seconds for call in self.calls)

    def by_picture(self) -> list[Trail]:
        """The run of each picture of the batch, branches of one step in one line.

        A call of a guidance branch by itself adds to the step of the conditional call before it.
        """
        count = max((self._pictures(call) for call in self.calls), default=0)
        trails = [Trail([], [], [], 0.0, 0.0) for _ in range(count)]
        for call in self.calls:
            places = range(count) if call.pictures is None else call.pictures
            follows = call.branch is not None and call.guide is None and not call.why
            for row, place in enumerate(places):
                trail = trails[place]
                trail.macs += call.macs / len(places)
                trail.full_macs += call.full_macs / len(places)
                if follows and trail.levels and trail.levels[-1] == call.level:
                    continue
                trail.levels.append(call.level)
                trail.modes.append(call.mode)
                trail.why.append(call.why[row] if call.why else None)
        return trails

    @staticmethod
    def _pictures(call: CallRecord) -> int:
        if call.pictures is not None:
            return max(call.pictures) + 1
        return call.count

    def to_dict(self) -> dict[str, object]:
        """Plain data: totals and one row per call."""
        rows = [
            {
                "index": index,
                "level": call.level,
                "branch": call.branch,
                "mode": call.mode.name if call.mode else None,
                "guide": call.guide.name if call.guide else None,
                "rows": call.rows,
                "macs": call.macs,
                "seconds": call.watch.seconds,
                "pictures": call.pictures,
                "why": list(call.why),
            }
            for index, call in enumerate(self.calls)
        ]
        totals = {"macs": self.macs, "ratio": self.ratio, "seconds": self.seconds}
        return {**totals, "budget": self.budget, "step_cache": self.cached, "calls": rows}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json_files.dumps(self.to_dict())

    @property
    def table(self) -> Table:
        """A row for each call, and the sums below."""
        rows = [
            (
                str(index),
                "-" if call.level is None else f"{call.level:.3f}",
                "-" if call.mode is None else call.mode.name,
                "-" if call.guide is None else call.guide.name,
                str(call.rows),
                figures.macs(call.macs),
                figures.seconds(call.watch.seconds),
            )
            for index, call in enumerate(self.calls)
        ]
        asked = "" if self.budget is None else f" (of {figures.share(self.budget)} allowed)"
        whole = f"{figures.macs(self.macs)}, {figures.seconds(self.seconds)} in the model"
        sums = (f"{figures.share(self.ratio)} of the full cost{asked}", f"per run: {whole}")
        sums += (CACHES,) * self.cached
        headings = ("call", "level", "mode", "guide", "batch rows", "per call", "time")
        return Table(headings=headings, rows=rows, below=sums)

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table.html()
