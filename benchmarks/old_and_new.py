"""Is this tree as fast as another one? The rows of benchmarks/speed.py, in alternating processes.

    git worktree add ../old COMMIT
    python benchmarks/old_and_new.py ../old [--batch 16] [--pairs 12] [--rounds 3] [--steps 25]

Writes benchmarks/results/old-and-new-batch<batch>.json. Each pair is a fresh process of either
tree, the first one in turn the old and the new. A process measures every row as its time over the
stock pipeline's, which runs beside it; the row's figure is the new process's median of these over
the old one's. Of all pairs come the median and the interval that holds the true median with at
least 95 % (between two order statistics, whatever the distribution).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditdial.measure.provenance import write_results

HERE = Path(__file__).parent
RUN = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import speed
batch, steps, rounds = map(int, sys.argv[3:])
rows = speed.bench(batch, steps, rounds, "cpu", compiled=False, keep_pages=False)
print(json.dumps({row["run"]: row["ratios"] for row in rows}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="root of the other tree")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    if arguments.pairs < 6:
        raise SystemExit(f"--pairs {arguments.pairs}; legal: 6 or more, for an interval of 95 %")
    trees = {"old": arguments.old.resolve(), "new": HERE.parent}
    commits = {name: commit(tree) for name, tree in trees.items()}
    found: dict[str, list[float]] = {}
    for pair in range(arguments.pairs):
        names = ("old", "new") if pair % 2 == 0 else ("new", "old")
        sizes = arguments.batch, arguments.steps, arguments.rounds
        medians = {name: measured(trees[name], *sizes) for name in names}
        for row, new in medians["new"].items():
            if row in medians["old"]:
                found.setdefault(row, []).append(new / medians["old"][row])
        rows = [summary(row, ratios) for row, ratios in found.items()]
        write_results(
            HERE / "results" / f"old-and-new-batch{arguments.batch}.json",
            {
                "old": commits["old"],
                "new": commits["new"],
                "batch": arguments.batch,
                "steps": arguments.steps,
                "rounds": arguments.rounds,
                "pairs": pair + 1,
                "rows": rows,
            },
        )
        print(f"pair {pair + 1} of {arguments.pairs}", flush=True)
    for row in rows:
        low, high = row["interval"]
        print(f"{row['run']:<44} {row['ratio']:.3f} ({low:.3f} to {high:.3f})")


def commit(tree: Path) -> str:
    asked = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def measured(tree: Path, batch: int, steps: int, rounds: int) -> dict[str, float]:
    """Median time ratio over the stock pipeline of each row, in a fresh process of one tree."""
    arguments = (tree / "benchmarks", tree, batch, steps, rounds)
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree / "src")},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    rows = json.loads(done.stdout.splitlines()[-1])
    return {row: statistics.median(ratios) for row, ratios in rows.items()}


def summary(row: str, ratios: Sequence[float]) -> dict[str, Any]:
    """The median of new over old, and its interval once there are pairs enough for one."""
    ordered, outside = sorted(ratios), outer(len(ratios))
    return {
        "run": row,
        "ratio": statistics.median(ordered),
        "interval": [ordered[outside], ordered[-1 - outside]],
        "ratios": list(ratios),
    }


def outer(count: int) -> int:
    """How many of the least (and of the most) lie outside the interval of 95 %."""
    outside, tail = 0, 0.0
    while (tail := tail + math.comb(count, outside) / 2**count) <= 0.025:
        outside += 1
    return max(outside - 1, 0)


if __name__ == "__main__":
    main()
