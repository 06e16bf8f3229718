"""Quality over cost on the reference model: schedules, guidance, recipes against fewer steps.

    python benchmarks/reference_table.py [--images 2000] [--tune-images 500] [--restart]

The baseline is the base at 10 steps, about where fewer begin to cost quality: a user who takes 25
would first take fewer.

Each row's guidance scale is tuned on other seeds than the ones reported, by descent on a fixed
grid. All rows share their seeds, so that differences are taken set by set: each elastic row is
compared with the base (``loss``) and with the base at fewer steps that take no less time
(``ahead``). Pictures are drawn in bfloat16 arithmetic by default, time ratios in float32.

Rows that exist in the results file are kept, so the script can be stopped and run again, or made
anew for an adapter that has changed; each tells its arithmetic and its commit. Writes
benchmarks/results/reference-<name>.json and .png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from ditdial import FULL, Schedule, elastify
from ditdial.evaluation.pareto import plot_pareto
from ditdial.evaluation.runner import Figure, Judge, as_row
from ditdial.measure.bench import interleave
from ditdial.measure.provenance import provenance, write_results
from ditdial.plan.execution import Execution
from ditdial.reference import load_reference, reference_adapter, reference_judge
from ditdial.sampling.batches import cyclic_labels, sample

RESULTS = Path(__file__).parent / "results"
FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SCALES = (1.0, 1.1, 1.2, 1.3, 1.45, 1.6, 1.8, 2.0, 2.3, 2.6, 3.0, 3.5, 4.0)
STEPS = 10
REPORT_SEED, TUNE_SEED = 0, 500_000
SETS = 4
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}

Row = dict[str, Any]


class Bench:
    """The reference model in one state, and the pictures of its full run."""

    def __init__(self, name: str, images: int, tune_images: int, dtype: str) -> None:
        self.name, self.images, self.tune_images = name, images, tune_images
        self.dtype = DTYPES[dtype]
        self.judge: Judge = reference_judge(name)
        self.pipe = load_reference(name)
        self.pipe.set_progress_bar_config(disable=True)
        self.full: torch.Tensor | None = None

    def draw(self, scale: float, steps: int, first_seed: int, count: int) -> torch.Tensor:
        labels = cyclic_labels(count, 10)
        seeds = range(first_seed, first_seed + count)
        arithmetic = contextlib.nullcontext()
        if self.dtype is not None:
            arithmetic = torch.autocast(self.pipe.device.type, self.dtype)
        with arithmetic:
            drawn = sample(
                self.pipe, labels, seeds, guidance_scale=scale, steps=steps, batch_size=100
            )
        return drawn.images.float()

    def tune(self, steps: int, start: float) -> tuple[float, dict[str, float]]:
        """The scale that no neighbour on the grid beats, found from ``start`` downhill."""
        labels = cyclic_labels(self.tune_images, 10)
        scores: dict[float, float] = {}

        def score(index: int) -> float:
            if not 0 <= index < len(SCALES):
                return math.inf
            scale = SCALES[index]
            if scale not in scores:
                images = self.draw(scale, steps, TUNE_SEED, self.tune_images)
                scores[scale] = self.judge.judge(images, labels, sets=1)["frechet"].value
            return scores[scale]

        here = SCALES.index(start)
        while True:
            best = min((here - 1, here, here + 1), key=score)
            if best == here:
                return SCALES[here], {str(scale): scores[scale] for scale in sorted(scores)}
            here = best

    def row(self, steps: int, start: float, scale: float | None = None, **facts: Any) -> Row:
        scores: dict[str, float] = {}
        if scale is None:
            scale, scores = self.tune(steps, start)
        images = self.draw(scale, steps, REPORT_SEED, self.images)
        labels = cyclic_labels(self.images, 10)
        figures = self.judge.judge(images, labels, sets=SETS, full=self.full)
        if self.full is None:
            self.full = images
        times = self.pipe.scheduler.timesteps
        levels = [round(float(times[end]) / 1000, 4) for end in (0, -1)]
        return as_row(figures, scale=scale, tuning=scores, steps=steps, levels=levels, **facts)

    def time_ratio(self, handle: Any, schedule: Schedule) -> float:
        labels, seeds = cyclic_labels(32, 10), list(range(32))

        def call(chosen):
            def run():
                handle.schedule = chosen
                self.pipe(labels, seeds=seeds, num_inference_steps=STEPS, output_type="pt")

            return run

        runs = {"full": call(Schedule.constant()), "row": call(schedule)}
        timings = interleave(runs, rounds=5, warmup=1)
        return timings["row"].ratio_to(timings["full"])


def known_rows(path: Path, *, restart: bool) -> list[Row]:
    """Rows that are there, which no row of other noise levels may join.

    Raises:
        SystemExit: rows that do not tell their levels ran at the scheduler's own.
    """
    rows = [] if restart or not path.exists() else json.loads(path.read_text())["rows"]
    if not all("levels" in row for row in rows):
        raise SystemExit(f"{path} has rows of the scheduler's own noise levels; use --restart")
    return rows


def compare(rows: list[Row]) -> None:
    """Add to each elastic row its paired difference to the base and to fewer steps."""
    base = next(row for row in rows if row["key"] == "base")
    fewer = {row["steps"]: row for row in rows if row["key"].startswith("fewer-steps/")}
    fewer[base["steps"]] = base
    for row in rows:
        if "weak_fraction" not in row:
            continue
        loss = _frechet(row).minus(_frechet(base))
        row["loss"], row["loss_noise"] = loss.value, loss.noise
        steps = _steps_as_long(row)
        if steps in fewer:
            ahead = _frechet(fewer[steps]).minus(_frechet(row))
            row["rival_steps"], row["rival_frechet"] = steps, fewer[steps]["frechet"]
            row["ahead"], row["ahead_noise"] = ahead.value, ahead.noise


def _frechet(row: Row) -> Figure:
    return Figure.over(row["frechet_sets"])


def _steps_as_long(row: Row) -> int:
    """The fewest full steps that take no less time than a row."""
    return min(STEPS, math.ceil(STEPS * row["time_ratio"] - 0.05))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="mnist")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--tune-images", type=int, default=500)
    parser.add_argument("--recipes", nargs="+", default=["lora", "shared"])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--restart", action="store_true")
    arguments = parser.parse_args()
    path = RESULTS / f"reference-{arguments.name}.json"
    rows = known_rows(path, restart=arguments.restart)
    bench = Bench(arguments.name, arguments.images, arguments.tune_images, arguments.dtype)
    facts = {
        "images": arguments.images,
        "tune_images": arguments.tune_images,
        "sets": SETS,
    }
    made = {"dtype": arguments.dtype, "commit": provenance()["commit"]}

    def keep(key: str, make) -> Row:
        found = next((row for row in rows if row["key"] == key), None)
        if found is None:
            found = {**made, **make(), "key": key}  # the base's row may be copied
            rows.append(found)
            if rows[0]["key"] == "base":
                compare(rows)
            write_results(path, {**facts, "rows": rows})
        names = ("ratio", "time_ratio", "scale", "frechet", "accuracy", "loss", "ahead")
        print(key, {k: round(found[k], 3) for k in names if k in found}, flush=True)
        return found

    base = keep("base", lambda: bench.row(STEPS, 1.3, ratio=1.0, time_ratio=1.0, series="base"))
    bench.full = bench.draw(base["scale"], STEPS, REPORT_SEED, bench.images)
    for recipe in arguments.recipes:
        handle = elastify(
            bench.pipe,
            reference_adapter(recipe, arguments.name),
            execution=Execution(merge=True),
        )
        for guidance in ("cfg", "weak"):
            start = base["scale"]
            for fraction in FRACTIONS:
                schedule = Schedule.weak_first(fraction, guidance=guidance)

                def make(
                    handle=handle,
                    schedule=schedule,
                    guidance=guidance,
                    fraction=fraction,
                    recipe=recipe,
                    start=start,
                ):
                    handle.schedule = schedule
                    ratio = handle.plan(STEPS).ratio
                    series = f"{recipe}, {guidance}"
                    if recipe == "lora" and handle.schedule.modes == {FULL}:  # the base itself
                        return base | {"series": series, "weak_fraction": fraction}
                    # Merged low-rank layers and retrained ones multiply the same: time them once.
                    twin = next(
                        (r for r in rows if r["key"] == f"lora/{guidance}/{fraction}"), None
                    )
                    seconds = twin["time_ratio"] if twin else bench.time_ratio(handle, schedule)
                    handle.schedule = schedule
                    return bench.row(
                        STEPS,
                        start,
                        ratio=ratio,
                        time_ratio=seconds,
                        series=series,
                        weak_fraction=fraction,
                    )

                start = keep(f"{recipe}/{guidance}/{fraction}", make)["scale"]
        handle.remove()
    rivals = {_steps_as_long(row) for row in rows if "weak_fraction" in row} - {STEPS}
    start = base["scale"]
    for steps in sorted(rivals, reverse=True):
        share = steps / STEPS
        start = keep(
            f"fewer-steps/{steps}",
            lambda steps=steps, share=share, start=start: bench.row(
                steps, start, ratio=share, time_ratio=share, series="base, fewer steps"
            ),
        )["scale"]
    series: dict[str, list[Row]] = {}
    for row in rows:
        series.setdefault(row["series"], []).append(row)
    series["base, fewer steps"] = [*series.get("base, fewer steps", []), base]
    series.pop("base", None)
    plot_pareto(series, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
