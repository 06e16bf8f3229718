"""Real architectures with random weights: stock diffusers against our modes.

    python benchmarks/architectures.py [--models flux-1-dev-1024 ...] [--batch 1]
    python benchmarks/architectures.py --reduced [--processes 5]

Seconds (median of interleaved rounds), peak memory and FLOPs of one forward pass, in bfloat16 on a
GPU, eager and compiled. Writes benchmarks/results/architectures.json.

`--reduced` needs no GPU: the same classes with a few narrow blocks and a short sequence, in
float32. One model is timed with and without its engine, so that its weights lie where they lie. The
ratios say what full mode adds to the stock forward, not how fast a real model is.
Writes benchmarks/results/overhead-<cpu|cuda>.json.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shapes import KNOWN, build, inputs

from ditdial import FULL, FlexiDiT, Mode, Schedule, elastify
from ditdial.measure.bench import in_fresh_processes, interleave, peak_memory
from ditdial.measure.provenance import write_results
from ditdial.published.models import Published

RESULTS = Path(__file__).parent / "results"
DEFAULT = (
    "dit-xl-2-256",
    "dit-xl-2-512",
    "pixart-sigma-1024",
    "flux-1-dev-1024",
    "wan-2.1-1.3b-480p",
)
REDUCED = {
    "dit-xl-2-256": {"num_layers": 4},
    "flux-1-dev-1024": {"num_attention_heads": 8, "num_layers": 2, "num_single_layers": 4},
    "wan-2.1-1.3b-480p": {"num_attention_heads": 8, "num_layers": 4, "ffn_dim": 4096},
}
REDUCED_GRIDS = {
    "dit-xl-2-256": (1, 16, 16),
    "flux-1-dev-1024": (1, 16, 16),
    "wan-2.1-1.3b-480p": (2, 12, 12),
}
MODES = (FULL, Mode(2), Mode(4))


@torch.no_grad()
def bench(
    known: Published, batch: int, *, compiled: bool, device: str, rounds: int, modes: tuple
) -> list[dict[str, Any]]:
    """One forward pass of the stock model and of each mode, in turn."""
    stock, elastic = (build(known, device) for _ in range(2))
    handle = elastify(elastic, FlexiDiT())
    call = inputs(known, stock, batch, device)
    if compiled:
        stock.compile()
        elastic.compile()

    def run(model: Any, mode: Mode | None = None) -> Any:
        def forward() -> None:
            if mode is not None:
                handle.schedule = Schedule.constant(mode)
            model(**call)

        return forward

    runs = {"stock": run(stock)} | {mode.name: run(elastic, mode) for mode in modes}
    timings = interleave(runs, rounds=rounds, warmup=3)
    size = handle.backbone.size(elastic, call)
    shape = handle.method.shape(elastic, handle.backbone, size)
    rows = []
    for name, timing in timings.items():
        mode = FULL if name == "stock" else Mode.parse(name)
        rows.append(
            {
                "batch": batch,
                "compiled": compiled,
                "run": name,
                "seconds": timing.median,
                "time_ratio": timing.ratio_to(timings["stock"]),
                "flops_ratio": shape.macs(mode) / shape.macs(FULL),
                "tflops": 2 * shape.macs(mode) * batch / 1e12,
                "peak_bytes": peak_memory(runs[name]),
            }
        )
        print({k: v for k, v in rows[-1].items() if k != "peak_bytes"}, flush=True)
    return rows


@torch.no_grad()
def overhead(name: str, device: str, rounds: int) -> float:
    """Time of full mode over that of the stock forward, with the same weights."""
    known = KNOWN[name]
    known = replace(known, config=known.config | REDUCED[name], grid=REDUCED_GRIDS[name])
    model = build(known, device)
    call, engine = inputs(known, model, 1, device), elastify(model, FlexiDiT())._engine
    installed = True

    def prepare(run: str) -> None:
        nonlocal installed
        if installed != (run == "full"):  # the same engine goes off and on: nothing is allocated
            (engine.uninstall if installed else engine.install)(model)
            installed = not installed
        model(**call)

    runs = dict.fromkeys(("stock", "full"), lambda: model(**call))
    timings = interleave(runs, rounds=rounds, prepare=prepare)
    return timings["full"].ratio_to(timings["stock"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(DEFAULT), choices=KNOWN)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--reduced", action="store_true", help="what full mode adds; any device")
    parser.add_argument("--processes", type=int, default=5, help="of --reduced")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.reduced:
        rows = []
        for name in REDUCED:
            measure = functools.partial(overhead, name, device, arguments.rounds)
            ratios = list(in_fresh_processes(measure, arguments.processes))
            rows.append({"model": name, "time_ratio": statistics.median(ratios), "ratios": ratios})
            print(rows[-1], flush=True)
        write_results(RESULTS / f"overhead-{device}.json", {"rows": rows})
        return
    if device == "cpu":
        raise SystemExit("real architectures need a GPU; --reduced runs anywhere")
    rows = []
    for name in arguments.models:
        for batch in arguments.batch:
            for compiled in (False, True):
                options = {"device": device, "rounds": arguments.rounds, "modes": MODES}
                found = bench(KNOWN[name], batch, compiled=compiled, **options)
                rows += [{"model": name, **row} for row in found]
                write_results(RESULTS / "architectures.json", {"rows": rows})


if __name__ == "__main__":
    main()
