"""Real architectures with random weights: stock diffusers against our modes, on a GPU, in bf16.

    python benchmarks/architectures.py [--models dit-xl-2-256 dit-xl-2-512] [--batch 1 8]

Seconds (median of interleaved rounds), peak memory and FLOPs of one guided forward pass, eager and
compiled. Writes benchmarks/results/architectures.json. `--tiny` is a dry run on any machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from elastic_dit import FULL, FlexiDiT, Mode, elastify
from elastic_dit.bench import interleave, peak_memory
from elastic_dit.evaluation.record import write_results

RESULTS = Path(__file__).parent / "results"
# heads, head width, blocks, latent side
MODELS = {
    "dit-xl-2-256": (16, 72, 28, 32),
    "dit-xl-2-512": (16, 72, 28, 64),
    "tiny": (2, 16, 2, 16),
}
MODES = (FULL, Mode(2), Mode(4))


def build(name: str, device: str, dtype: torch.dtype) -> DiTTransformer2DModel:
    heads, head_dim, layers, side = MODELS[name]
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=side,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return model.to(device, dtype).eval()


@torch.no_grad()
def bench(
    name: str, batch: int, *, compiled: bool, device: str, rounds: int
) -> list[dict[str, Any]]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    stock, elastic = build(name, device, dtype), build(name, device, dtype)
    handle = elastify(elastic, FlexiDiT(), merge=True)
    if compiled:
        stock.compile()
        elastic.compile()
    side = MODELS[name][3]
    x = torch.randn(2 * batch, 4, side, side, device=device, dtype=dtype)
    t = torch.full((2 * batch,), 500, device=device)
    y = torch.cat([torch.arange(batch), torch.full((batch,), 1000)]).to(device)

    def call(model, mode=None):
        def run():
            if mode is None:
                return model(x, timestep=t, class_labels=y)
            with handle.using(mode):
                return model(x, timestep=t, class_labels=y)

        return run

    runs = {"stock": call(stock)} | {mode.name: call(elastic, mode) for mode in MODES}
    timings = interleave(runs, rounds=rounds, warmup=3)
    macs = handle.shape.macs
    rows = []
    for run, timing in timings.items():
        mode = FULL if run == "stock" else Mode.parse(run)
        rows.append(
            {
                "model": name,
                "batch": batch,
                "compiled": compiled,
                "run": run,
                "seconds": timing.median,
                "time_ratio": timing.ratio_to(timings["stock"]),
                "flops_ratio": macs(mode) / macs(FULL),
                "tflops": 2 * macs(mode) * 2 * batch / 1e12,
                "peak_bytes": peak_memory(runs[run]),
            }
        )
        print({k: v for k, v in rows[-1].items() if k != "peak_bytes"}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=["dit-xl-2-256", "dit-xl-2-512"], choices=MODELS
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--tiny", action="store_true", help="dry run: a tiny model, eager, any device"
    )
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        raise SystemExit("real architectures need a GPU; use --tiny for a dry run")
    rows = []
    for name in ["tiny"] if arguments.tiny else arguments.models:
        for batch in arguments.batch:
            for compiled in (False,) if arguments.tiny else (False, True):
                rows += bench(
                    name, batch, compiled=compiled, device=device, rounds=arguments.rounds
                )
                if not arguments.tiny:
                    write_results(RESULTS / "architectures.json", {"rows": rows})


if __name__ == "__main__":
    main()
