"""Quality over cost on the reference model: schedules, guidance, recipes against fewer steps.

    python benchmarks/reference_table.py [--images 1200] [--tune-images 160] [--restart]

The baseline is the base at 10 steps, about where fewer begin to cost quality: a user who takes 25
would first take fewer.

Each row's guidance scale is tuned on other seeds than the ones reported. Rows that exist in the
results file are kept, so the script can be stopped and run again. Writes
benchmarks/results/reference-<name>.json and .png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from elastic_dit import FULL, Schedule, elastify
from elastic_dit.bench import interleave
from elastic_dit.evaluation.pareto import plot_pareto
from elastic_dit.evaluation.record import write_results
from elastic_dit.evaluation.runner import Judge, as_row
from elastic_dit.reference import load_reference, reference_adapter, reference_judge
from elastic_dit.sampling import cyclic_labels, sample

RESULTS = Path(__file__).parent / "results"
FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SCALES = (1.1, 1.3, 1.6, 2.2)
STEPS = 10
REPORT_SEED, TUNE_SEED = 0, 500_000
SETS = 4


class Bench:
    """The reference model in one state, and the pictures of its full run."""

    def __init__(self, name: str, images: int, tune_images: int) -> None:
        self.name, self.images, self.tune_images = name, images, tune_images
        self.judge: Judge = reference_judge(name)
        self.pipe = load_reference(name)
        self.full: torch.Tensor | None = None

    def draw(self, scale: float, steps: int, first_seed: int, count: int) -> torch.Tensor:
        labels = cyclic_labels(count, 10)
        seeds = range(first_seed, first_seed + count)
        drawn = sample(self.pipe, labels, seeds, guidance_scale=scale, steps=steps, batch_size=100)
        return drawn.images

    def best_scale(self, steps: int) -> tuple[float, dict[str, float]]:
        labels = cyclic_labels(self.tune_images, 10)
        scores = {}
        for scale in SCALES:
            images = self.draw(scale, steps, TUNE_SEED, self.tune_images)
            scores[str(scale)] = self.judge.judge(images, labels, sets=1)["frechet"].value
        return float(min(scores, key=scores.__getitem__)), scores

    def row(self, steps: int, **facts: Any) -> dict[str, Any]:
        scale, scores = self.best_scale(steps)
        images = self.draw(scale, steps, REPORT_SEED, self.images)
        labels = cyclic_labels(self.images, 10)
        figures = self.judge.judge(images, labels, sets=SETS, full=self.full)
        if self.full is None:
            self.full = images
        return as_row(figures, scale=scale, tuning=scores, steps=steps, **facts)

    def time_ratio(self, handle: Any, schedule: Schedule) -> float:
        labels, seeds = cyclic_labels(32, 10), list(range(32))

        def call(chosen):
            def run():
                handle.schedule = chosen
                self.pipe(labels, seeds=seeds, num_inference_steps=STEPS, output_type="pt")

            return run

        runs = {"full": call(Schedule.constant()), "row": call(schedule)}
        timings = interleave(runs, rounds=3, warmup=1)
        return timings["row"].ratio_to(timings["full"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="mnist")
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--tune-images", type=int, default=160)
    parser.add_argument("--recipes", nargs="+", default=["lora", "shared"])
    parser.add_argument("--restart", action="store_true")
    arguments = parser.parse_args()
    path = RESULTS / f"reference-{arguments.name}.json"
    rows: list[dict[str, Any]] = []
    if path.exists() and not arguments.restart:
        rows = json.loads(path.read_text())["rows"]
    bench = Bench(arguments.name, arguments.images, arguments.tune_images)
    facts = {"images": arguments.images, "tune_images": arguments.tune_images, "sets": SETS}

    def keep(key: str, make) -> dict[str, Any]:
        found = next((row for row in rows if row["key"] == key), None)
        if found is None:
            found = {**make(), "key": key}
            rows.append(found)
            write_results(path, {**facts, "rows": rows})
        shown = {k: found.get(k) for k in ("ratio", "time_ratio", "scale", "frechet", "accuracy")}
        print(key, shown, flush=True)
        return found

    base = keep("base", lambda: bench.row(STEPS, ratio=1.0, time_ratio=1.0, series="base"))
    bench.full = bench.draw(base["scale"], STEPS, REPORT_SEED, bench.images)
    for recipe in arguments.recipes:
        handle = elastify(bench.pipe, reference_adapter(recipe, arguments.name), merge=True)
        for guidance in ("cfg", "weak"):
            for fraction in FRACTIONS:
                schedule = Schedule.weak_first(fraction, guidance=guidance)

                def make(
                    handle=handle,
                    schedule=schedule,
                    guidance=guidance,
                    fraction=fraction,
                    recipe=recipe,
                ):
                    handle.schedule = schedule
                    ratio = handle.plan(STEPS).ratio
                    if recipe == "lora" and handle.schedule.modes == {FULL}:  # the base itself
                        return base | {"series": f"{recipe}, {guidance}", "weak_fraction": fraction}
                    # Merged low-rank layers and retrained ones multiply the same: time them once.
                    twin = next(
                        (r for r in rows if r["key"] == f"lora/{guidance}/{fraction}"), None
                    )
                    seconds = twin["time_ratio"] if twin else bench.time_ratio(handle, schedule)
                    handle.schedule = schedule
                    return bench.row(
                        STEPS,
                        ratio=ratio,
                        time_ratio=seconds,
                        series=f"{recipe}, {guidance}",
                        weak_fraction=fraction,
                    )

                keep(f"{recipe}/{guidance}/{fraction}", make)
        handle.remove()
    for key in [f"lora/cfg/{fraction}" for fraction in FRACTIONS[1:]]:
        ratio = next(row["time_ratio"] for row in rows if row["key"] == key)
        steps = max(1, round(STEPS * ratio))
        share = steps / STEPS
        keep(
            f"fewer-steps/{steps}",
            lambda steps=steps, share=share: bench.row(
                steps, ratio=share, time_ratio=share, series="base, fewer steps"
            ),
        )
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault(row["series"], []).append(row)
    series["base, fewer steps"] = [*series.get("base, fewer steps", []), base]
    series.pop("base", None)
    plot_pareto(series, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
