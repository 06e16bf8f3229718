"""Do seconds follow FLOPs? The reference model through its whole pipeline, stock against elastic.

    python benchmarks/speed.py [--batch 8 16 32] [--rounds 9] [--compile]

Writes benchmarks/results/speed-<cpu|cuda>[-compiled].json: for each batch size, the time ratio of
full mode and of each schedule over the stock pipeline, beside its FLOPs ratio. With ``--compile``
both transformers are compiled, each shape and mode into a graph of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from elastic_dit import Mode, Schedule, elastify
from elastic_dit.bench import interleave
from elastic_dit.evaluation.record import write_results
from elastic_dit.reference import load_reference, reference_adapter

RESULTS = Path(__file__).parent / "results"
SCHEDULES = {
    "full": Schedule.constant(),
    "weak-first 0.48": Schedule.weak_first(0.48),
    "weak-first 0.72": Schedule.weak_first(0.72),
    "weak-first 0.88/1": Schedule.weak_first(0.88, guide_fraction=1.0),
    "patch2 throughout": Schedule.constant(Mode(2)),
    "patch4 throughout": Schedule.constant(Mode(4)),
    "weak guidance, full conditional": Schedule.weak_first(0.0, guidance="weak"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tables = []
    for batch in arguments.batch:
        rows = bench(batch, arguments.steps, arguments.rounds, device, compiled=arguments.compile)
        tables.append({"batch": batch, "rows": rows})
        name = f"speed-{device}{'-compiled' if arguments.compile else ''}.json"
        write_results(RESULTS / name, {"steps": arguments.steps, "tables": tables})


def bench(
    batch: int, steps: int, rounds: int, device: str, *, compiled: bool
) -> list[dict[str, object]]:
    stock, pipe = load_reference().to(device), load_reference().to(device)
    for each in (stock, pipe):
        each.set_progress_bar_config(disable=True)
    handle = elastify(pipe, reference_adapter("lora"), merge=True)
    if compiled:
        torch._dynamo.reset()
        for each in (stock, pipe):
            each.transformer.compile(dynamic=False)
    labels, seeds = [i % 10 for i in range(batch)], list(range(batch))

    def run(which, schedule=None, *, packed=False):
        def call():
            if schedule is not None:
                handle.schedule, handle.packed = schedule, packed
            which(labels, seeds=seeds, num_inference_steps=steps, output_type="pt")

        return call

    runs = {"stock": run(stock)}
    runs |= {name: run(pipe, schedule) for name, schedule in SCHEDULES.items()}
    mixed = "weak guidance, full conditional"
    runs[f"{mixed}, packed"] = run(pipe, SCHEDULES[mixed], packed=True)
    timings = interleave(runs, rounds=rounds)
    rows = []
    for name, timing in timings.items():
        handle.schedule = SCHEDULES.get(name.removesuffix(", packed"), Schedule.constant())
        handle.packed = name.endswith(", packed")
        ratio = handle.plan(steps).ratio
        time_ratio = timing.ratio_to(timings["stock"])
        rows.append(
            {"run": name, "flops_ratio": ratio, "time_ratio": time_ratio, "seconds": timing.median}
        )
        print(f"batch {batch:>3}  {name:<40} FLOPs {ratio:.3f}  time {time_ratio:.3f}", flush=True)
    return rows


if __name__ == "__main__":
    main()
