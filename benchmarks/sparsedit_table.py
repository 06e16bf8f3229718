"""SparseDiT on the reference model, against what the same training and the same time buy.

    python benchmarks/sparsedit_table.py [--static runs/mnist-dydit-static/export] [--images 400]

Rows: the base, and the base at fewer steps; the control, the same weights trained as long with
nothing left out (the recipe differs in nothing else); SparseDiT with its schedule of two densities,
and with each of its grids throughout. All have the same seeds and a guidance scale of their own,
tuned on others. ``against_static`` is as in `routed_table.py`.

Rows that exist in the results file are kept. Writes benchmarks/results/sparsedit-<name>.json.
"""

from __future__ import annotations

from frontier import STEPS, Frontier
from routed_table import compare, controls
from rows import RESULTS, Rows, parser_of

from elastic_dit import Schedule, elastify
from elastic_dit.reference import reference_adapter


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    rows = Rows(RESULTS / f"sparsedit-{arguments.name}.json", arguments, STEPS, compare)
    bench = Frontier(arguments.name, arguments.images, arguments.tune_images, arguments.dtype)
    controls(bench, arguments.static, rows)
    adapter = arguments.adapter or reference_adapter("sparsedit", arguments.name)
    handle = bench.handle = elastify(bench.pipe, adapter)
    plans = {"schedule": handle.schedule}
    plans |= {mode.name: Schedule.constant(mode) for mode in handle.method.modes}
    for name, schedule in plans.items():

        def choose(schedule: Schedule = schedule) -> None:
            handle.schedule = schedule

        rows.keep(f"sparsedit/{name}", lambda choose=choose: bench.measured(choose))


if __name__ == "__main__":
    main()
