"""What the low band adds to a step: its two transforms and all that goes with them, over the step.

    python benchmarks/low_band.py [--models flux-1-dev-1024 wan-2.1-1.3b-480p] [--rounds 5]

Latents and text of the published size; random weights. On a GPU the whole model in bfloat16. On a
CPU a twin with two blocks of full width in float32, whose coarse step takes a part of a real one's,
so that the share is above that of the real model. In each call the stock forward of the smaller
latent is timed inside the whole of it. Writes benchmarks/results/low-band-<cpu|cuda>.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from shapes import KNOWN, build, inputs

from ditdial import LowBand, Mode, elastify
from ditdial.measure.provenance import write_results
from ditdial.runtime.model_class import engine_of

RESULTS = Path(__file__).parent / "results"
DEFAULT = ("flux-1-dev-1024", "wan-2.1-1.3b-480p")
TWINS: dict[str, dict[str, int]] = {
    "flux-1-dev-1024": {"num_layers": 1, "num_single_layers": 1},
    "wan-2.1-1.3b-480p": {"num_layers": 2},
}
BAND = Mode(low_band=2)


@dataclass(eq=False)
class Pipe:
    """As much of a pipeline as says what predictions mean."""

    transformer: Any
    scheduler: Any


@torch.no_grad()
def measure(name: str, device: str, rounds: int) -> dict[str, Any]:
    """Seconds of the stock forward of the smaller latent, and what the whole call adds."""
    known = KNOWN[name]
    if device == "cpu":
        known = replace(known, config=known.config | TWINS[name])
    model = build(known, device)
    call = inputs(known, model, 1, device)
    pipe = Pipe(model, FlowMatchEulerDiscreteScheduler())
    handle = elastify(pipe, LowBand())
    engine = engine_of(model)
    assert engine is not None
    forward, inside = engine.passes.compiled.run, []

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(*arguments: Any) -> Any:
        start = now()
        output = forward(*arguments)
        inside.append(now() - start)
        return output

    engine.passes.compiled.run = timed  # pyrefly: ignore[bad-assignment]
    shares, steps = [], []
    with handle.using(BAND):
        for index in range(rounds + 1):
            start = now()
            model(**call)
            whole = now() - start
            if index:  # the first one makes the tables
                steps.append(inside[-1])
                shares.append((whole - inside[-1]) / inside[-1])
    return {
        "model": name,
        "blocks": "all" if device == "cuda" else "two",
        "step_seconds": statistics.median(steps),
        "added_share": statistics.median(shares),
        "shares": shares,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(DEFAULT), choices=list(TWINS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in arguments.models:
        rows.append(measure(name, device, arguments.rounds))
        print(rows[-1], flush=True)
    write_results(RESULTS / f"low-band-{device}.json", {"rows": rows})


if __name__ == "__main__":
    main()
