"""Does routed width run as fast as it is narrow? DiT-XL/2's blocks, stock against routed.

    python benchmarks/routed_speed.py [--width 0.5] [--batch 8 16] [--rows] [--compile]

Gates are forced to a share of the heads and channels, which costs the same as if they were trained.
On a GPU the shape is DiT-XL/2 at 256 pixels in bfloat16; on a CPU the same depth of a third of the
width. Both rows of each table run interleaved, one forward pass of a guided batch each.

Writes benchmarks/results/routed-speed-<cpu|cuda>[-compiled].json: time and MAC ratios of the routed
model over the stock one, for slices that are cut at every call and for slices that are kept. With
``--rows``, instead, seconds of one feed-forward with half of its tokens left out over all of them,
for batches of few rows.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from ditdial import FULL, DyDiT, Mode, elastify
from ditdial.measure.bench import interleave
from ditdial.measure.provenance import write_results

RESULTS = Path(__file__).parent / "results"
ROWS = (16, 32, 64, 128, 256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--heads", type=int, default=0, help="16 on a GPU, 6 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads = arguments.heads or (16 if device == "cuda" else 6)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    stock = model_of(heads, arguments.depth).to(device, dtype)
    if arguments.rows:
        rows = few_rows(stock, arguments.rounds)
        write_results(RESULTS / f"routed-rows-{device}.json", {"heads": heads, "rows": rows})
        return
    tables = [bench(stock, batch, arguments, device) for batch in arguments.batch]
    facts = {"heads": heads, "depth": arguments.depth, "dtype": str(dtype), "tables": tables}
    name = f"routed-speed-{device}{'-compiled' if arguments.compile else ''}.json"
    write_results(RESULTS / name, facts)


def model_of(heads: int, depth: int) -> Any:
    """DiT-XL/2 at 256 pixels, if it has 16 heads; random weights cost the same as trained ones."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=72, num_layers=depth, sample_size=32
    ).eval()


def call_of(batch: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A guided batch: twice as many rows as pictures."""
    x = torch.randn(2 * batch, 4, 32, 32, device=device, dtype=dtype)
    labels = torch.arange(2 * batch, device=device)
    return {
        "hidden_states": x,
        "timestep": torch.full((2 * batch,), 500.0, device=device),
        "class_labels": labels,
    }


def bench(stock: Any, batch: int, arguments: Any, device: str) -> dict[str, Any]:
    """One table: ratios over the stock model at one batch size."""
    width = arguments.width
    handle = elastify(copy.deepcopy(stock), DyDiT(widths=(width,), tokens=False))
    handle._engine.wiring.new.force(Mode(width=width), width, width)
    call = call_of(batch, device, stock.dtype)
    if arguments.compile:
        torch._dynamo.reset()
        stock.compile(dynamic=False)
        handle.model.compile(dynamic=False)

    def run(model: Any, mode: Mode | None = None, slices: int = 1):
        def forward() -> None:
            with torch.no_grad():
                if mode is None:
                    model(**call)
                    return
                handle._engine.surgery.widths.slices = slices
                handle._engine.chooser.forced = mode  # handle.using begins a new run each time
                model(**call)

        return forward

    routed = Mode(width=width)
    runs = {
        "stock": run(stock),
        "full": run(handle.model, FULL),
        "routed, cut at every call": run(handle.model, routed, 0),
        "routed, slices kept": run(handle.model, routed, 1),
    }
    timings = interleave(runs, rounds=arguments.rounds)
    rows = []
    for name, timing in timings.items():
        mode = routed if name.startswith("routed") else FULL
        ratio = handle.shape.macs(mode) / handle.shape.macs(FULL)
        time_ratio = timing.ratio_to(timings["stock"])
        rows.append(
            {"run": name, "macs_ratio": ratio, "time_ratio": time_ratio, "seconds": timing.median}
        )
        print(f"batch {batch:>3}  {name:<28} MACs {ratio:.3f}  time {time_ratio:.3f}", flush=True)
    return {"batch": batch, "width": width, "rows": rows}


def few_rows(stock: Any, rounds: int) -> list[dict[str, float]]:
    """Gathering half of the rows, or computing all and multiplying."""
    feed_forward, found = stock.transformer_blocks[0].ff, []
    weight = stock.transformer_blocks[0].ff.net[2].weight
    for count in ROWS:
        x = torch.randn(1, count, weight.shape[0], device=weight.device, dtype=weight.dtype)
        logits = torch.randn(count, device=weight.device)

        def whole(x=x, logits=logits) -> None:
            with torch.no_grad():
                feed_forward(x) * (logits > 0).to(x.dtype)[None, :, None]

        def gathered(x=x, logits=logits) -> None:
            with torch.no_grad():
                kept = (logits > 0).nonzero()[:, 0]
                y = feed_forward(x[0][kept][None])[0]
                torch.zeros_like(x[0]).index_copy_(0, kept, y)

        timings = interleave({"whole": whole, "gathered": gathered}, rounds=20 * rounds)
        ratio = timings["gathered"].ratio_to(timings["whole"])
        kept_share = (logits > 0).float().mean().item()
        found.append({"rows": count, "kept": kept_share, "time_ratio": ratio})
        print(f"rows {count:>5}  kept {kept_share:.2f}  time {ratio:.3f}", flush=True)
    return found


if __name__ == "__main__":
    main()
