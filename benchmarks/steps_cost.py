"""Does a budget cost the same with another number of steps, or another scheduler?

    python benchmarks/steps_cost.py

Plans every budget of the shipped calibration, in whole percents, for runs of several lengths, and
compares the planned share of the full cost with that of 50 steps. Writes
benchmarks/results/steps-cost.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers import FlowMatchHeunDiscreteScheduler

from elastic_dit import elastify
from elastic_dit.evaluation.record import write_results
from elastic_dit.reference import load_reference, reference_adapter

RESULTS = Path(__file__).parent / "results"
USUAL = 50
STEPS = (10, 25, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="mnist")
    arguments = parser.parse_args()
    pipe = load_reference(arguments.name)
    handle = elastify(pipe, reference_adapter("lora", arguments.name), merge=True)
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
        tables.append({"guided": guided, "rows": rows})
        for run in runs:
            apart = [abs(row[run] - row["usual"]) for row in rows]
            over = sum(each > 0.01 for each in apart)
            told = f"{over} of {len(rows)} off by more than 1 %, most {max(apart):.2%}"
            print(f"guided {guided}  {run:<15} {told}")
    write_results(RESULTS / "steps-cost.json", {"tables": tables})


def cheapest(handle: object, *, guided: bool) -> float:
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
