"""Do seconds follow MACs where blocks see fewer tokens? Full mode and sparse grids, against stock.

    python benchmarks/sparsedit_speed.py [--models dit-xl-2-512 ...] [--batch 2] [--compile]

On a GPU the published architectures, in bfloat16; on a CPU the same classes with fewer and narrower
blocks and shorter sequences, in float32, so that ratios can be read and seconds cannot. Plans are
those of `SparseDiT.for_depth`, the sparse grids the same shares of the dense one for all: 6, 8, 10,
12, 16 and 20 of 32 tokens to a side. Weights are random: seconds do not depend on them. Writes
benchmarks/results/sparsedit-speed-<cpu|cuda>[-compiled].json: for each model and mode the time
ratio over the stock model, interleaved, beside its MAC ratio in our counting and in the paper's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shapes import KNOWN, build, inputs

from ditdial import FULL, Mode, SparseDiT, elastify
from ditdial.measure.bench import interleave
from ditdial.measure.provenance import write_results
from ditdial.published.costs import as_published
from ditdial.published.models import Published

RESULTS = Path(__file__).parent / "results"
SHARES = (6 / 32, 8 / 32, 10 / 32, 12 / 32, 16 / 32, 20 / 32)


@dataclass(frozen=True)
class Reduced:
    """What is smaller on a CPU: entries of the config, base tokens, text tokens."""

    config: dict[str, Any]
    grid: tuple[int, int, int]
    text_tokens: int = 0


NARROW = {"num_attention_heads": 4, "num_layers": 12}
NARROW_TEXT = {**NARROW, "cross_attention_dim": 288, "caption_channels": 288}
REDUCED = {
    "dit-xl-2-512": Reduced(NARROW, (1, 32, 32)),
    "pixart-sigma-1024": Reduced({**NARROW_TEXT, "sample_size": 64}, (1, 32, 32), 120),
    "latte-1-512": Reduced({**NARROW_TEXT, "sample_size": 32, "video_length": 8}, (8, 16, 16), 120),
    "wan-2.1-1.3b-480p": Reduced(
        {"num_attention_heads": 2, "num_layers": 12, "ffn_dim": 1024, "text_dim": 256},
        (5, 16, 26),
        128,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(REDUCED), choices=REDUCED)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"sparsedit-speed-{device}{'-compiled' if arguments.compile else ''}.json"
    models = []
    for model in arguments.models:
        known = KNOWN[model]
        if device == "cpu":
            small = REDUCED[model]
            known = Published(
                known.model_class, known.config | small.config, small.grid, small.text_tokens
            )
        print(model, flush=True)
        models.append({"model": model, **bench(known, arguments, device)})
        setting = {"batch": arguments.batch, "rounds": arguments.rounds}
        write_results(arguments.output / name, {**setting, "models": models})


def bench(known: Published, arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """Times of one model's modes, in turn."""
    stock, model = (build(known, device) for _ in range(2))
    _, height, width = known.grid
    sides = [(round(height * share), round(width * share)) for share in SHARES]
    ends = [1 - number / len(sides) for number in range(1, len(sides))]
    stages = tuple(zip((*ends, 0.0), sides, strict=True))
    method = SparseDiT.for_depth(model.config.num_layers, stages=stages)
    handle = elastify(model, method)
    if arguments.compile:
        for each in (stock, model):
            each.compile(dynamic=False)
    call = inputs(known, stock, arguments.batch, device)

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
    backbone = handle.backbone
    shape = method.shape(model, backbone, backbone.size(model, call))
    papers = as_published(shape)
    rows = []
    for name, mode in modes.items():
        row = {
            "mode": name,
            "macs_ratio": shape.macs(mode) / shape.macs(FULL),
            "macs_ratio_published": (papers if mode.is_sparse else shape).macs(mode)
            / shape.macs(FULL),
            "time_ratio": timings[name].ratio_to(timings["stock"]),
            "seconds": timings[name].median,
        }
        rows.append(row)
        print(
            f"{name:<10} MACs {row['macs_ratio']:.3f} (paper's counting "
            f"{row['macs_ratio_published']:.3f})  time {row['time_ratio']:.3f}",
            flush=True,
        )
    return {
        "grid": known.grid,
        "text_tokens": known.text_tokens,
        "depth": model.config.num_layers,
        "width": model.config.num_attention_heads * model.config.attention_head_dim,
        "threads": torch.get_num_threads(),
        "plan": method.to_config(),
        "gmacs_full": shape.macs(FULL) / 1e9,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
