"""How to spend a budget: one frontier for fixed schedules, solved plans, DDiT, PPFlow, fewer steps.

    python benchmarks/frontier.py [--images 800] [--tune-images 200] [--series ...] [--restart]
                                  [--results benchmarks/results]

The reference model at 12 steps. Every row has the same seeds and a guidance scale of its own, tuned
on others; that of a solved plan is the one that its calibration was measured at. Solved plans use
the calibration that ships with the LoRA adapter; those of ``solved weak reference`` one that aims
at weak guidance below a noise level of 0.8. That is the shipped one where it has this aim, or else
measured here on tuning seeds, at the guidance scale that is best for it, and kept beside the
results. DDiT's thresholds are calibrated on tuning seeds, once with FlexiDiT's weights (so that
only the choice differs) and once with its own. ``against_fixed`` is the paired difference to the
best hand-set schedule of the same budget and guidance.

Rows that exist in the results file are kept. Writes frontier-<name>.json and .png, and how DDiT's
choices differ from picture to picture: cost by class, and its rank correlation with the detail of
the picture (its mean absolute gradient) in the full run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from reference_table import REPORT_SEED, SETS, TUNE_SEED, Bench, Row, _frechet, known_rows
from torch import Tensor

from ditdial import FULL, DDiTController, Handle, Mode, Schedule, Segment, elastify
from ditdial.evaluation.pareto import plot_pareto
from ditdial.measure.bench import interleave
from ditdial.measure.provenance import write_results
from ditdial.plan.budget import Budget
from ditdial.plan.calibration import Calibration
from ditdial.plan.execution import Execution
from ditdial.plan.facts import Facts
from ditdial.plan.threshold import settled
from ditdial.plan.weak_first import weak_first_for_budget
from ditdial.reference import reference_adapter
from ditdial.sampling.batches import cyclic_labels, sample

RESULTS = Path(__file__).parent / "results"
STEPS = 12
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.75)
START = 1.3
SERIES = (
    "weak-first",
    "weak guidance",
    "solved path",
    "solved picture",
    "solved weak reference",
    "ddit lora",
    "ddit ddit",
    "ppflow",
    "coarse to fine",
)
TRACES = 100
WEAK_BELOW = 0.8
"""Where weak guidance begins to be the better aim; from the first step on it fails (lab notes)."""

PICTURES, PICTURE_STEPS = 48, 16
"""Of a calibration, as for the shipped one."""

Choose = Callable[[], None]
"""Sets what a row's runs use."""


class Costs:
    """Adds up what the calls of many batches really cost."""

    def __init__(self) -> None:
        self.macs = self.full = 0.0
        self.pictures: list[float] = []

    def add(self, handle: Handle, count: int) -> None:
        calls = handle.report().calls
        self.macs += sum(call.macs for call in calls)
        self.full += sum(call.full_macs for call in calls)
        own = [0.0] * count
        for call in calls:
            places = range(count) if call.pictures is None else call.pictures
            for place in places:
                own[place] += call.macs / len(places)
        whole = sum(call.full_macs for call in calls) / count
        self.pictures += [cost / whole for cost in own]


class Frontier(Bench):
    """The reference model with one adapter at a time."""

    handle: Handle | None = None

    def use(self, adapter: str | None) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle = None
        if adapter is not None:
            folder = reference_adapter(adapter, self.name)
            self.handle = elastify(self.pipe, folder, execution=Execution(merge=True))

    def draw(self, scale: float, steps: int, first_seed: int, count: int) -> Tensor:
        self.costs = Costs()
        parts = []
        for start in range(0, count, 100):
            size = min(100, count - start)
            parts.append(super().draw(scale, steps, first_seed + start, size))
            if self.handle is not None:
                self.costs.add(self.handle, size)
        return torch.cat(parts)

    def measured(self, choose: Choose, scale: float | None = None, **facts: Any) -> Row:
        """Tune (unless told a scale), draw and judge; the cost is what really ran."""
        choose()
        row = self.row(STEPS, START, scale, **facts)
        row["ratio"] = self.costs.macs / self.costs.full
        row["time_ratio"] = self.seconds(choose, row["scale"])
        row["cost_quartiles"] = (
            torch.tensor(self.costs.pictures)
            .quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
            .tolist()
        )
        return row

    def seconds(self, choose: Choose, scale: float = START) -> float:
        handle = self.handle
        assert handle is not None
        labels, seeds = cyclic_labels(32, 10), list(range(32))

        def full() -> None:
            handle.schedule = Schedule.constant()

        def call(which: Choose) -> Callable[[], None]:
            def run() -> None:
                which()
                how = {"num_inference_steps": STEPS, "guidance_scale": scale}
                self.pipe(labels, seeds=seeds, output_type="pt", **how)

            return run

        timings = interleave({"full": call(full), "row": call(choose)}, rounds=5, warmup=1)
        return timings["row"].ratio_to(timings["full"])

    def traces(self, controller: DDiTController) -> list[list[dict[str, Any]]]:
        """Statistics of runs of tuning seeds."""
        handle = self.handle
        assert handle is not None
        handle.controller = controller
        self.draw(START, STEPS, TUNE_SEED, TRACES)
        return [trail.why for trail in handle.report().by_picture()]

    def facts(self) -> Facts:
        handle = self.handle
        assert handle is not None
        handle.schedule = Schedule.constant()
        levels = tuple(step.level for step in handle.plan(STEPS).steps)
        return Facts(levels=levels, macs=handle.shape.macs, guided=True)


def weak_reference(bench: Frontier, path: Path, *, restart: bool) -> Calibration:
    """The adapter's errors with weak guidance as the aim at all but the highest noise levels."""
    handle, reference = bench.handle, Schedule.weak_guidance_below(WEAK_BELOW)
    assert handle is not None
    if handle.calibration is not None and handle.calibration.reference == reference:
        return handle.calibration
    if path.exists() and not restart:
        return Calibration.load(path)
    handle.schedule = reference
    scale, _ = bench.tune(STEPS, START)
    labels, seeds = cyclic_labels(PICTURES, 10), range(TUNE_SEED, TUNE_SEED + PICTURES)

    def draw(batch: int) -> None:
        sample(bench.pipe, labels, seeds, guidance_scale=scale, steps=PICTURE_STEPS)

    found = handle.calibrate(
        draw,
        guidance_scale=scale,
        reference=reference,
        data={"first_seed": TUNE_SEED, "labels": "in turn", "tune_images": bench.tune_images},
    )
    found.save(path)
    return found


def fixed(handle: Handle, budget: float) -> Iterator[tuple[str, Schedule]]:
    """Schedules that somebody would set by hand for a budget."""
    macs = handle.shape.macs
    yield "weak-first", weak_first_for_budget(budget, macs, handle.method.modes)
    share = {mode: macs(mode) / macs(FULL) for mode in (Mode(2), Mode(4))}
    # The noisiest fifth four times as coarse, then patch x2, then full mode.
    rest = (1 - budget - 0.2 * (1 - share[Mode(4)])) / (1 - share[Mode(2)])
    if 0 < rest <= 0.8:
        edges = (1.0, 0.8, round(0.8 - rest, 9), 0.0)
        parts = zip(edges, edges[1:], (Mode(4), Mode(2), FULL), strict=False)
        segments = [Segment(start=a, stop=b, mode=mode) for a, b, mode in parts if a > b]
        yield "coarse to fine", Schedule(segments)
    # Weak-model guidance: all guidance weak from 20 % on, as much of the rest as it takes.
    for share in range(10, 101, 2):  # none at all fails: see the lab notes
        schedule = Schedule.weak_first(share / 100, guidance="weak")
        handle.schedule = schedule
        if handle.plan(STEPS).ratio <= budget:
            yield "weak guidance", schedule
            break


def detail(images: Tensor) -> Tensor:
    """Mean absolute gradient of each picture, ``(n,)``."""
    across = images.diff(dim=3).abs().mean(dim=(1, 2, 3))
    return across + images.diff(dim=2).abs().mean(dim=(1, 2, 3))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; equal values share their mean rank."""

    def ranks(x: Tensor) -> Tensor:
        _, place, count = x.unique(return_inverse=True, return_counts=True)
        ends = count.cumsum(0).double()
        return (ends - (count - 1) / 2)[place]

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def spread(bench: Frontier, row: Row, full: Tensor) -> dict[str, Any]:
    """How a row's cost differs between pictures, and with what."""
    costs = torch.tensor(bench.costs.pictures)
    labels = torch.tensor(cyclic_labels(len(costs), 10))
    return {
        "key": row["key"],
        "mean_by_class": [costs[labels == digit].mean().item() for digit in range(10)],
        "histogram": torch.histc(costs, bins=20, min=0, max=1).int().tolist(),
        "correlation_with_detail": rank_correlation(costs, detail(full)),
    }


def compare(rows: list[Row]) -> None:
    """Paired differences: to the base, to fewer steps, and to the best hand-set schedule."""
    base = next(row for row in rows if row["key"] == "base")
    for row in rows:
        if row is base:
            continue
        loss = _frechet(row).minus(_frechet(base))
        row["loss"], row["loss_noise"] = loss.value, loss.noise
        budget = row.get("budget")
        for name, own in (("steps", "fewer steps"), ("fixed", "hand-set")):
            rivals = [r for r in rows if r.get("budget") == budget and r.get("kind") == own]
            if rivals and row.get("kind") not in (own, None):
                best = min(rivals, key=lambda r: r["frechet"])
                apart = _frechet(row).minus(_frechet(best))
                row[f"against_{name}"], row[f"against_{name}_noise"] = apart.value, apart.noise
                row[f"best_{name}"] = best["key"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="mnist")
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--tune-images", type=int, default=200)
    parser.add_argument("--series", nargs="+", default=SERIES, choices=SERIES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write into")
    parser.add_argument("--restart", action="store_true")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"frontier-{arguments.name}.json"
    facts = {
        "images": arguments.images,
        "tune_images": arguments.tune_images,
        "steps": STEPS,
        "sets": SETS,
        "dtype": arguments.dtype,
    }
    rows = known_rows(path, restart=arguments.restart)
    spreads: list[dict[str, Any]] = json.loads(path.read_text())["spreads"] if rows else []
    bench = Frontier(arguments.name, arguments.images, arguments.tune_images, arguments.dtype)

    def keep(key: str, make: Callable[[], Row], spreading: bool = False) -> Row:
        found = next((row for row in rows if row["key"] == key), None)
        if found is None:
            found = {**make(), "key": key}
            rows.append(found)
            if spreading:
                assert bench.full is not None
                spreads.append(spread(bench, found, bench.full))
            compare(rows)
            write_results(path, {**facts, "rows": rows, "spreads": spreads})
        names = ("ratio", "time_ratio", "scale", "frechet", "accuracy", "loss", "against_fixed")
        print(key, {k: round(found[k], 3) for k in names if k in found}, flush=True)
        return found

    base = keep("base", lambda: bench.row(STEPS, START, ratio=1.0, time_ratio=1.0, series="base"))
    bench.full = bench.draw(base["scale"], STEPS, REPORT_SEED, bench.images)
    for budget in BUDGETS:
        steps = round(STEPS * budget)
        share = steps / STEPS
        settings = {"series": "fewer steps", "kind": "fewer steps", "budget": budget}
        keep(
            f"fewer-steps/{budget}",
            lambda steps=steps, share=share, settings=settings: bench.row(
                steps, START, ratio=share, time_ratio=share, **settings
            ),
        )
    bench.use("lora")
    handle = bench.handle
    assert handle is not None
    solved = {"path": handle.calibration, "picture": handle.calibration}
    if "solved weak reference" in arguments.series:
        cache = arguments.results / f"frontier-{arguments.name}-weak-calibration.json"
        solved["weak reference"] = weak_reference(bench, cache, restart=arguments.restart)
    for budget in BUDGETS:
        for name, schedule in fixed(handle, budget):
            if name not in arguments.series:
                continue

            def set_by_hand(schedule: Schedule = schedule) -> None:
                handle.schedule = schedule

            settings = {"series": name, "kind": "hand-set", "budget": budget}
            keep(
                f"{name}/{budget}",
                lambda choose=set_by_hand, settings=settings: bench.measured(choose, **settings),
            )
        for name, calibration in solved.items():
            if f"solved {name}" not in arguments.series:
                continue
            assert calibration is not None
            spent = Budget(budget, criterion="picture" if name == "picture" else "path")

            def solve(calibration: Calibration = calibration, spent: Budget = spent) -> None:
                handle.calibration = calibration
                handle.budget = spent

            settings = {"series": f"solved, {name}", "kind": "solved", "budget": budget}
            settings["calibrated_at"] = settings["scale"] = calibration.guidance_scale
            keep(
                f"solved {name}/{budget}",
                lambda choose=solve, settings=settings: bench.measured(choose, **settings),
            )
    for weights in ("lora", "ddit"):
        if f"ddit {weights}" not in arguments.series:
            continue
        bench.use(weights)
        handle = bench.handle
        assert handle is not None
        series = "DDiT" if weights == "ddit" else "DDiT's choice, FlexiDiT's weights"
        # Patch x4 was trained on noisy levels only, and a threshold would use it on clean ones.
        controller = DDiTController(tau=0.0, start=Mode(2), coarse=(Mode(2),))
        known_facts = bench.facts()
        for budget in BUDGETS:
            if any(row["key"] == f"ddit {weights}/{budget}" for row in rows):
                continue
            tuned = settled(controller, budget, bench.traces, known_facts)

            def look(handle: Handle = handle, tuned: DDiTController = tuned) -> None:
                handle.controller = tuned

            settings = {"series": series, "kind": "ddit", "budget": budget, "tau": tuned.tau}
            keep(
                f"ddit {weights}/{budget}",
                lambda choose=look, settings=settings: bench.measured(choose, **settings),
                spreading=True,
            )
    bench.use("ppflow" if "ppflow" in arguments.series else "lora")
    handle = bench.handle
    assert handle is not None
    stages = handle.schedule
    for name, gains in (("guided", (1.0, 1.0)), ("first stage unguided", (0.0, 1.0))):
        if "ppflow" not in arguments.series:
            continue
        pairs = zip(stages.segments, gains, strict=True)
        schedule = Schedule([replace(segment, gain=gain) for segment, gain in pairs])

        def staged(handle: Handle = handle, schedule: Schedule = schedule) -> None:
            handle.schedule = schedule

        keep(
            f"ppflow/{name}",
            lambda choose=staged: bench.measured(choose, series="PPFlow", kind="ppflow"),
        )
    drawn: dict[str, list[Row]] = {}
    for row in rows:
        drawn.setdefault(row["series"], []).append(row)
    plot_pareto(drawn, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
