"""SparseDiT on the reference model, against what the same training and the same time buy.

    python benchmarks/sparsedit_table.py [--static runs/mnist-dydit-static/export] [--images 400]
        [--also runs/mnist-sparsedit-data runs/mnist-sparsedit-modules2]

Rows: the base, and the base at fewer steps; the control, the same weights trained as long on the
data with nothing left out; SparseDiT with its schedule of two densities, and with each of its grids
throughout; and the schedule of other runs of the recipe, as it is without a teacher or with another
plan of the blocks. All have the same seeds and a guidance scale of their own, tuned on others.
``against_...`` are as in `routed_table.py`, which has the same controls: if its results file
has the same pictures, they are taken from there.

Rows that exist in the results file are kept. Writes benchmarks/results/sparsedit-<name>.json.
"""

from __future__ import annotations

from pathlib import Path

from frontier import STEPS, Frontier
from routed_table import compare, controls
from rows import RESULTS, Rows, parser_of

from ditdial import Schedule, elastify
from ditdial.handle import Handle
from ditdial.reference import reference_adapter


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--also", type=Path, nargs="*", default=[], metavar="RUN")
    arguments = parser.parse_args()
    controls_of = RESULTS / f"routed-{arguments.name}.json"
    path = RESULTS / f"sparsedit-{arguments.name}.json"
    rows = Rows(path, arguments, STEPS, compare, controls_of)
    bench = Frontier(arguments.name, arguments.images, arguments.tune_images, arguments.dtype)
    controls(bench, arguments.static, rows)
    adapter = arguments.adapter or reference_adapter("sparsedit", arguments.name)
    handle = bench.handle = elastify(bench.pipe, adapter)
    plans = {"schedule": handle.schedule}
    plans |= {mode.name: Schedule.constant(mode) for mode in handle.method.modes}
    for name, schedule in plans.items():

        def choose(schedule: Schedule = schedule) -> None:
            handle.schedule = schedule

        rows.keep(
            f"sparsedit/{name}",
            lambda choose=choose: bench.measured(choose),
            lambda choose=choose: bench.seconds(choose),
        )
    for run in arguments.also:
        handle = bench.handle = elastify(bench.pipe, run / "export")

        def schedule(handle: Handle = handle) -> None:
            handle.schedule = handle.method.default_schedule

        rows.keep(
            f"{run.name}/schedule",
            lambda: bench.measured(schedule),
            lambda: bench.seconds(schedule),
        )


if __name__ == "__main__":
    main()
