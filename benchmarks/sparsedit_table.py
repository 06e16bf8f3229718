"""SparseDiT on the reference model, against what the same training and the same time buy.

    python benchmarks/sparsedit_table.py [--static runs/mnist-dydit-static/export] [--images 400]

Rows: the base, and the base at fewer steps; the control, the same weights trained as long with
nothing left out (the recipe differs in nothing else); SparseDiT with its schedule of two densities,
and with each of its grids throughout. All have the same seeds and a guidance scale of their own,
tuned on others. ``against_static`` is as in `routed_table.py`.

Rows that exist in the results file are kept. Writes benchmarks/results/sparsedit-<name>.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from frontier import STEPS, Frontier
from reference_table import SETS, Row
from routed_table import compare, controls

from elastic_dit import Schedule, elastify
from elastic_dit.evaluation.record import write_results
from elastic_dit.reference import reference_adapter

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="mnist")
    parser.add_argument("--static", type=Path, default=Path("runs/mnist-dydit-static/export"))
    parser.add_argument("--adapter", type=Path, default=None, help="the shipped one by default")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--tune-images", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--restart", action="store_true")
    arguments = parser.parse_args()
    path = RESULTS / f"sparsedit-{arguments.name}.json"
    rows: list[Row] = []
    if path.exists() and not arguments.restart:
        rows = json.loads(path.read_text())["rows"]
    facts = {
        "images": arguments.images,
        "tune_images": arguments.tune_images,
        "steps": STEPS,
        "dtype": arguments.dtype,
        "sets": SETS,
    }
    bench = Frontier(arguments.name, arguments.images, arguments.tune_images, arguments.dtype)

    def keep(key: str, make: Callable[[], Row]) -> Row:
        found = next((row for row in rows if row["key"] == key), None)
        if found is None:
            found = {**make(), "key": key}
            rows.append(found)
            compare(rows)
            write_results(path, {**facts, "rows": rows})
        names = ("ratio", "time_ratio", "scale", "frechet", "accuracy", "loss")
        print(key, {k: round(found[k], 3) for k in names if k in found}, flush=True)
        return found

    controls(bench, arguments.static, keep)
    adapter = arguments.adapter or reference_adapter("sparsedit", arguments.name)
    handle = bench.handle = elastify(bench.pipe, adapter)
    plans = {"schedule": handle.schedule}
    plans |= {mode.name: Schedule.constant(mode) for mode in handle.method.modes}
    for name, schedule in plans.items():

        def choose(schedule: Schedule = schedule) -> None:
            handle.schedule = schedule

        keep(f"sparsedit/{name}", lambda choose=choose: bench.measured(choose))


if __name__ == "__main__":
    main()
