"""Do seconds follow FLOPs? The reference model through its whole pipeline, stock against elastic.

    python benchmarks/speed.py [--batch 8 16 32] [--rounds 5] [--processes 5] [--compile]
        [--keep-pages]

Writes benchmarks/results/speed-<cpu|cuda>[-compiled][-kept-pages].json: for each batch size, the
time ratio of full mode and of each schedule over the stock pipeline, beside its FLOPs ratio: the
median over all rounds of all processes, and the least and the most median of a process. The stock
pipeline runs again beside every run. With ``--compile`` all transformers are compiled, each shape
and mode into a graph of its own.

"Stock, patch 8" and "stock, patch 16" are untrained stock models of the same width and depth that
have as many tokens as the coarse modes: what the class itself takes for so few, with no engine
around it.

With ``--keep-pages`` the C library keeps the memory of what is freed. By default it gives large
pieces back and gets them anew, page by page, which takes up to a third of a run: mostly of those
with large activations, and in one process more often than in another.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from tests.elastic_models import run_as

from ditdial import FULL, Mode, Schedule, elastify
from ditdial.backbones import backbone_for
from ditdial.measure.bench import beside, in_fresh_processes
from ditdial.measure.memory import flush_denormals, keep_freed_memory
from ditdial.measure.provenance import write_results
from ditdial.plan.execution import Execution
from ditdial.reference import load_reference, reference_adapter
from ditdial.sampling.pixel_pipeline import PixelDiTPipeline

RESULTS = Path(__file__).parent / "results"
MIXED = "weak guidance, full conditional"
PACKED = f"{MIXED}, packed"
SCHEDULES = {
    "full": Schedule.constant(),
    "weak-first 0.48": Schedule.weak_first(0.48),
    "weak-first 0.72": Schedule.weak_first(0.72),
    "weak-first 0.88/1": Schedule.weak_first(0.88, guide_fraction=1.0),
    "patch2 throughout": Schedule.constant(Mode(2)),
    "patch4 throughout": Schedule.constant(Mode(4)),
    MIXED: Schedule.weak_first(0.0, guidance="weak"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--keep-pages", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = {"-compiled": arguments.compile, "-kept-pages": arguments.keep_pages}
    name = f"speed-{device}{''.join(kind for kind, asked in kinds.items() if asked)}.json"
    tables = []
    for batch in arguments.batch:
        measure = functools.partial(
            bench,
            batch,
            arguments.steps,
            arguments.rounds,
            device,
            compiled=arguments.compile,
            keep_pages=arguments.keep_pages,
        )
        found = list(in_fresh_processes(measure, arguments.processes))
        rows = [summary(rows) for rows in zip(*found, strict=True)]
        for row in rows:
            print(
                f"batch {batch:>3}  {row['run']:<40} FLOPs {row['flops_ratio']:.3f}  time "
                f"{row['time_ratio']:.3f} ({row['least']:.3f} to {row['most']:.3f})",
                flush=True,
            )
        tables.append({"batch": batch, "rows": rows})
        setting = {"steps": arguments.steps, "processes": arguments.processes}
        write_results(RESULTS / name, {**setting, "tables": tables})


def summary(rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One run in all processes."""
    medians = [statistics.median(row["ratios"]) for row in rows]
    ratios = [ratio for row in rows for ratio in row["ratios"]]
    return {
        "run": rows[0]["run"],
        "flops_ratio": rows[0]["flops_ratio"],
        "time_ratio": statistics.median(ratios),
        "least": min(medians),
        "most": max(medians),
    }


def bench(
    batch: int, steps: int, rounds: int, device: str, *, compiled: bool, keep_pages: bool
) -> list[dict[str, Any]]:
    """Time ratios of all runs in this process."""
    flush_denormals()  # as the command line does
    if keep_pages and not keep_freed_memory():
        raise SystemExit("--keep-pages; legal: with glibc, whose malloc can be told so")
    stock, pipe = load_reference().to(device), load_reference().to(device)
    floors = {f"stock, patch {size}": of_patch(stock, size) for size in (8, 16)}
    for each in (stock, pipe, *floors.values()):
        each.set_progress_bar_config(disable=True)
    handle = elastify(pipe, reference_adapter("lora"), execution=Execution(merge=True))
    if compiled:
        torch._dynamo.reset()
        for each in (stock, pipe, *floors.values()):
            each.transformer.compile(dynamic=False)
    labels, seeds = [i % 10 for i in range(batch)], list(range(batch))

    def run(which, schedule=None, packed=False):
        def call():
            if schedule is not None:
                handle.schedule = schedule
                run_as(handle, packed=packed)
            which(labels, seeds=seeds, num_inference_steps=steps, output_type="pt")

        return call

    runs = {name: run(each) for name, each in floors.items()}
    runs |= {name: run(pipe, schedule) for name, schedule in SCHEDULES.items()}
    runs[PACKED] = run(pipe, SCHEDULES[MIXED], packed=True)
    rows = []
    for name, ratios in beside(run(stock), runs, rounds=rounds).items():
        if name in floors:
            flops_ratio = macs(floors[name]) / macs(stock)
        else:
            run_as(handle, packed=name == PACKED)
            handle.schedule = SCHEDULES[MIXED if name == PACKED else name]
            flops_ratio = handle.plan(steps).ratio
        rows.append({"run": name, "flops_ratio": flops_ratio, "ratios": ratios})
    return rows


def of_patch(pipe: PixelDiTPipeline, size: int) -> PixelDiTPipeline:
    """The same pipeline around an untrained model of another patch size."""
    config = {**pipe.transformer.config, "patch_size": size}
    model = DiTTransformer2DModel.from_config(config).eval().to(pipe.device)
    return PixelDiTPipeline(model, pipe.scheduler, pipe.config.data_mean, pipe.config.data_std)


def macs(pipe: PixelDiTPipeline) -> float:
    """Multiply-adds of one row in one stock call."""
    model = pipe.transformer
    backbone = backbone_for(model)
    return backbone.shape(model, *backbone.default_size(model)).macs(FULL)


if __name__ == "__main__":
    main()
