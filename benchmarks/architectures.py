"""Real architectures with random weights: stock diffusers against our modes.

    python benchmarks/architectures.py [--models flux-1-dev-1024 ...] [--batch 1]
    python benchmarks/architectures.py --reduced [--processes 5]

Seconds (median of interleaved rounds), peak memory and FLOPs of one forward pass, in bfloat16 on a
GPU, eager and compiled. Writes benchmarks/results/architectures.json.

`--reduced` needs no GPU: the same classes with a few narrow blocks and a short sequence, in
float32. One model is timed with and without its handle, so that its weights lie where they lie. The
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

import diffusers
import torch

from elastic_dit import FULL, FlexiDiT, Mode, Schedule, elastify
from elastic_dit.backbones.published import MODELS, Published
from elastic_dit.bench import in_fresh_processes, interleave, peak_memory
from elastic_dit.evaluation.record import write_results

RESULTS = Path(__file__).parent / "results"
DIT = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
KNOWN = {
    "dit-xl-2-256": Published("DiTTransformer2DModel", {**DIT, "sample_size": 32}, (1, 16, 16), 0),
    "dit-xl-2-512": Published("DiTTransformer2DModel", {**DIT, "sample_size": 64}, (1, 32, 32), 0),
    **MODELS,
}
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


def inputs(known: Published, model: Any, batch: int, device: str) -> dict[str, Any]:
    """A call at the published size, with random latents and text."""
    (frames, height, width), text = known.grid, known.text_tokens
    config, dtype = model.config, model.dtype

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def image(*frame: int) -> torch.Tensor:
        return random(batch, config.in_channels, *frame, 2 * height, 2 * width)

    times = torch.full((batch,), 500.0, device=device)
    if known.model_class == "DiTTransformer2DModel":
        labels = torch.arange(batch, device=device)
        return {"hidden_states": image(), "timestep": times, "class_labels": labels}
    if known.model_class == "FluxTransformer2DModel":
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        ids = torch.cat([torch.zeros(len(places), 1), places], dim=1)
        return {
            "hidden_states": random(batch, height * width, config.in_channels),
            "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
            "pooled_projections": random(batch, config.pooled_projection_dim),
            "timestep": times / 1000,
            "img_ids": ids.to(device),
            "txt_ids": torch.zeros(text, 3, device=device),
            "guidance": torch.full((batch,), 3.5, device=device),
        }
    if known.model_class == "SD3Transformer2DModel":
        return {
            "hidden_states": image(),
            "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
            "pooled_projections": random(batch, config.pooled_projection_dim),
            "timestep": times,
        }
    text_width = config.text_dim if "text_dim" in config else config.caption_channels
    call = {"encoder_hidden_states": random(batch, text, text_width), "timestep": times}
    if known.model_class == "PixArtTransformer2DModel":
        return call | {"hidden_states": image(), "added_cond_kwargs": {}}
    return call | {"hidden_states": image(frames)}


@torch.no_grad()
def bench(
    known: Published, batch: int, *, compiled: bool, device: str, rounds: int, modes: tuple
) -> list[dict[str, Any]]:
    """One forward pass of the stock model and of each mode, in turn."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    built = []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.device(device):
            model = getattr(diffusers, known.model_class)(**known.config)
        built.append(model.to(dtype).eval())
    stock, elastic = built
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
    backbone = handle.backbone.adapting(handle.method.adapts)
    shape = backbone.shape(elastic, *size).with_low_rank(handle.method.low_rank)
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
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(diffusers, known.model_class)(**known.config).eval()
    call, handles = inputs(known, model, 1, device), []

    def prepare(run: str) -> None:
        while handles:
            handles.pop().remove()
        if run == "full":
            handles.append(elastify(model, FlexiDiT()))
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
