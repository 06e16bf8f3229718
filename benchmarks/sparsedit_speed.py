"""Do seconds follow MACs where blocks see fewer tokens? Full mode and sparse grids, against stock.

    python benchmarks/sparsedit_speed.py [--width 256] [--depth 12] [--side 32] [--batch 2]

The shape is DiT-XL/2 at 512 pixels, narrower and shallower so that a CPU runs it: 32 x 32 tokens,
with the plan of `SparseDiT.for_depth`. Weights are random: seconds do not depend on them. Writes
benchmarks/results/sparsedit-speed-<cpu|cuda>[-compiled].json: for each mode the time ratio over the
stock model, interleaved, beside its MAC ratio in our counting and in the paper's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from elastic_dit import FULL, Mode, SparseDiT, elastify
from elastic_dit.bench import interleave
from elastic_dit.evaluation.record import write_results

RESULTS = Path(__file__).parent / "results"
PATCH, HEAD = 2, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--side", type=int, default=32, help="tokens per side")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sides", type=int, nargs="+", default=[6, 8, 10, 12, 16, 20])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = bench(arguments, device)
    name = f"sparsedit-speed-{device}{'-compiled' if arguments.compile else ''}.json"
    write_results(arguments.output / name, results)


def model_of(arguments: argparse.Namespace, device: str) -> Any:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=arguments.width // HEAD,
        attention_head_dim=HEAD,
        in_channels=4,
        out_channels=8,
        num_layers=arguments.depth,
        sample_size=arguments.side * PATCH,
        patch_size=PATCH,
    )
    return model.eval().to(device, torch.bfloat16 if arguments.bf16 else torch.float32)


def bench(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    stock, model = (model_of(arguments, device) for _ in range(2))
    count = len(arguments.sides)
    stages = tuple((1 - (i + 1) / count, side) for i, side in enumerate(arguments.sides))
    stages = (*stages[:-1], (0.0, arguments.sides[-1]))
    method = SparseDiT.for_depth(arguments.depth, stages=stages)
    handle = elastify(model, method)
    if arguments.compile:
        for each in (stock, model):
            each.compile(dynamic=False)
    latent = arguments.side * PATCH
    call = {
        "hidden_states": torch.randn(arguments.batch, 4, latent, latent).to(device, model.dtype),
        "timestep": torch.full((arguments.batch,), 500.0, device=device),
        "class_labels": torch.arange(arguments.batch, device=device),
    }

    def run(mode: Mode | None) -> Callable[[], None]:
        @torch.no_grad()
        def forward() -> None:
            if mode is None:
                stock(**call)
                return
            with handle.using(mode):
                model(**call)

        return forward

    modes = {mode.name: mode for mode in handle.modes}
    timings = interleave(
        {"stock": run(None), **{name: run(mode) for name, mode in modes.items()}},
        rounds=arguments.rounds,
    )
    shape = handle.shape
    assert shape.sparse is not None
    papers = replace(shape, sparse=replace(shape.sparse, published=True))
    rows = []
    for name, mode in modes.items():
        row = {
            "mode": name,
            "macs_ratio": shape.macs(mode) / shape.macs(FULL),
            "macs_ratio_published": papers.macs(mode) / papers.macs(FULL),
            "time_ratio": timings[name].ratio_to(timings["stock"]),
            "seconds": timings[name].median,
        }
        rows.append(row)
        print(
            f"{name:<8} MACs {row['macs_ratio']:.3f} (paper's counting "
            f"{row['macs_ratio_published']:.3f})  time {row['time_ratio']:.3f}",
            flush=True,
        )
    facts = {k: v for k, v in vars(arguments).items() if k != "output"}
    return {
        "setting": facts | {"threads": torch.get_num_threads(), "plan": method.to_config()},
        "gmacs_full": shape.macs(FULL) / 1e9,
        "stock_seconds": timings["stock"].median,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
