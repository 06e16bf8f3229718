"""Does a budget cost the same with another number of steps, or another scheduler?

    python benchmarks/steps_cost.py

Plans every budget of the shipped calibration, in whole percents, for runs of several lengths, and
compares the planned share of the full cost with that of 50 steps. Of the budgets that are off by
more than 1 % it tells for how many no plan of that many steps, good or bad, comes nearer. Writes
benchmarks/results/steps-cost.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers import FlowMatchHeunDiscreteScheduler

from ditdial import FULL, Handle, Schedule, elastify
from ditdial.measure.provenance import write_results
from ditdial.plan.execution import Execution
from ditdial.reference import load_reference, reference_adapter

RESULTS = Path(__file__).parent / "results"
USUAL = 50
STEPS = (10, 25, 100)
NEAR = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="mnist")
    arguments = parser.parse_args()
    pipe = load_reference(arguments.name)
    handle = elastify(
        pipe,
        reference_adapter("lora", arguments.name),
        execution=Execution(merge=True),
    )
    euler = pipe.scheduler
    heun = FlowMatchHeunDiscreteScheduler.from_config(euler.config)
    runs = {f"{steps} steps": (euler, steps) for steps in STEPS} | {"50 steps, Heun": (heun, USUAL)}
    tables = []
    for guided in (True, False):
        budgets = [round(0.01 * percent, 2) for percent in range(1, 101)]
        budgets = [b for b in budgets if b >= cheapest(handle, guided=guided)]
        rows = []
        for budget in budgets:
            handle.budget = budget
            shares = {}
            for run, (scheduler, steps) in {"usual": (euler, USUAL), **runs}.items():
                pipe.scheduler = scheduler
                shares[run] = handle.plan(steps, guidance=guided).ratio
            pipe.scheduler = euler
            rows.append({"budget": budget, **shares})
        summary = {}
        for run in runs:
            apart = [abs(row[run] - row["usual"]) for row in rows]
            off = [row for row, each in zip(rows, apart, strict=True) if each > NEAR]
            pipe.scheduler, steps = runs[run]
            calls = len(handle.plan(steps, guidance=guided).steps)
            pipe.scheduler = euler
            costs = every_cost(handle, calls, guided=guided) if off else set()
            never = sum(not is_met(row, costs) for row in off)
            summary[run] = {"off": len(off), "with_any_plan": never, "most": max(apart)}
            print(
                f"guided {guided}  {run:<15} {len(off)} of {len(rows)} off by more than 1 %, most "
                f"{max(apart):.2%}; {never} with any plan"
            )
        tables.append({"guided": guided, "summary": summary, "rows": rows})
    handle.schedule = Schedule.constant()
    steps = handle.plan(USUAL).steps
    levels = [round(step.level, 4) for step in (steps[0], steps[-1])]
    write_results(RESULTS / "steps-cost.json", {"levels": levels, "tables": tables})


def every_cost(handle: Handle, calls: int, *, guided: bool) -> set[float]:
    """What plans of that many calls can cost, as shares of the full run: of any choice per call."""
    macs = handle.shape.macs
    modes = sorted(macs(mode) / macs(FULL) for mode in handle.modes)
    # Each branch of a guided step has a mode, and the guide none that is finer.
    pairs = {(own + guide) / 2 for own in modes for guide in modes if guide <= own}
    sums = {0.0}
    for _ in range(calls):
        sums = {round(s + each / calls, 9) for s in sums for each in (pairs if guided else modes)}
    return sums


def is_met(row: dict[str, float], costs: set[float]) -> bool:
    """Whether a cost within the budget is near that of the usual number of steps."""
    return any(abs(cost - row["usual"]) <= NEAR and cost <= row["budget"] + 1e-9 for cost in costs)


def cheapest(handle: Handle, *, guided: bool) -> float:
    """The share of the cost below which no run of ten steps has a plan."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        try:
            handle.budget = middle
            for steps in (*STEPS, USUAL):
                handle.plan(steps, guidance=guided)
            high = middle
        except ValueError:
            low = middle
    return high


if __name__ == "__main__":
    main()
