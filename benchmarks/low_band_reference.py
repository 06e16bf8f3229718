"""Where the low band pays: error by level, and quality over cost beside rivals that change the run.

    python benchmarks/low_band_reference.py --data <folder or hub id> [--images 400] [--steps 12]

The reference base that knows two sizes, 32 and 16 pixels. First the base's own objective (mean
squared error, unit-variance target) on test pictures, level by level: full mode, the low band, and
for comparison the shipped base, which knows one size. Then runs of the same seeds and one guidance
scale: ``low-band`` has its first k steps low; ``progressive-resolution`` (as SPEED) makes as many
steps on small pictures and as many on large ones, so that its cost is the same;
``draft-and-refine`` (as MrFlow) has a draft and refining steps of nearly that cost;
``fewer-steps`` as many full steps as fit into it. Writes
benchmarks/results/low-band-<name>.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditdial import FULL, LowBand, Mode, PixelDiTPipeline, Schedule, elastify
from ditdial.evaluation.rivals import DraftAndRefine, ProgressiveResolution, Rival
from ditdial.evaluation.runner import as_row
from ditdial.handle import Handle
from ditdial.measure.provenance import write_results
from ditdial.ops.flow import network_input_and_target
from ditdial.plan.choice import Choice
from ditdial.reference import load_reference, reference_judge
from ditdial.sampling.batches import cyclic_labels
from ditdial.training.config import DataConfig
from ditdial.training.data import ImageData

RESULTS = Path(__file__).parent / "results"
LEVELS = (0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
BAND = Mode(low_band=2)
SETS = 4
BATCH = 50

Draw = Callable[[list[int], list[int]], Tensor]
"""Pictures ``(n, C, H, W)`` of labels and seeds."""


def low_band(pipe: PixelDiTPipeline) -> Handle:
    return elastify(pipe, LowBand(force=True))


@torch.no_grad()
def error_by_level(name: str, two_sizes: str, data: str, images: int) -> list[dict[str, Any]]:
    """The objective of both bases in both modes at each noise level."""
    pipes = {"two sizes": load_reference(two_sizes), "one size": load_reference(name)}
    handles = {key: low_band(pipe) for key, pipe in pipes.items()}
    facts = pipes["one size"].config
    config = DataConfig(
        path=data,
        split="test",
        channels=pipes["one size"].transformer.config.in_channels,
        mean=facts["data_mean"],
        std=facts["data_std"],
    )
    held_out = ImageData(config, limit=images)
    pictures, labels = held_out.batch(0, len(held_out), 0, torch.device("cpu"))
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    rows = []
    for level in LEVELS:
        x, target = network_input_and_target(pictures, noise, torch.tensor(level))
        times = torch.full((len(pictures),), level * 1000)
        row: dict[str, Any] = {"level": level}
        for key, handle in handles.items():
            for mode in (FULL, BAND):
                with handle.using(mode):
                    found = handle.model(x, timestep=times, class_labels=labels).sample
                row[f"{key}, {mode.name}"] = (found - target).square().mean().item()
        rows.append(row)
        print({k: round(v, 4) for k, v in row.items()}, flush=True)
    return rows


def contenders(
    pipe: PixelDiTPipeline, handle: Handle, steps: int, scale: float
) -> Iterator[tuple[dict[str, Any], Draw]]:
    """Ways to run, each with its facts; the first one is the full run."""
    levels = [step.level for step in handle.plan(steps).steps]
    part = handle.shape.macs(BAND) / handle.shape.macs(FULL)

    def own(schedule: Schedule, count: int = steps) -> Draw:
        def draw(labels: list[int], seeds: list[int]) -> Tensor:
            handle.schedule = schedule
            return pipe(
                labels,
                seeds=seeds,
                guidance_scale=scale,
                num_inference_steps=count,
                output_type="pt",
            ).images

        return draw

    def rival(how: Rival) -> Draw:
        def draw(labels: list[int], seeds: list[int]) -> Tensor:
            handle.schedule = Schedule.constant()
            side = pipe.transformer.config.sample_size
            asked = {"seeds": seeds, "guidance_scale": scale, "output_type": "pt"}
            size = {"height": side, "width": side}
            return how.draw(pipe, class_labels=labels, **asked, **size).images

        return draw

    yield {"run": "full", "ratio": 1.0}, own(Schedule.constant())
    for low in (2, 3, 4, 6, 8, 10):
        passes = steps - low + part * low
        cost = passes / steps
        choices = [Choice(mode=BAND)] * low + [Choice()] * (steps - low)
        facts = {"low_steps": low, "switch": round((levels[low - 1] + levels[low]) / 2, 4)}
        schedule = Schedule.of_steps(levels, choices)
        yield {"run": "low-band", "ratio": cost, **facts}, own(schedule)
        speed = ProgressiveResolution(coarse_steps=low, fine_steps=steps - low)
        yield {"run": speed.name, "ratio": cost, **_steps(speed)}, rival(speed)
        refine = max(1, round(passes - 12 * part))
        draft = DraftAndRefine(
            draft_steps=max(1, int((passes - refine) / part)), refine_steps=refine
        )
        made = part * draft.draft_steps + draft.refine_steps
        yield {"run": draft.name, "ratio": made / steps, **_steps(draft)}, rival(draft)
        count = int(passes)
        fewer = {"run": "fewer-steps", "ratio": count / steps, "steps": count}
        yield fewer, own(Schedule.constant(), count)


def _steps(rival: Rival) -> dict[str, int]:
    """How many steps a rival makes on small pictures and on large ones."""
    return dict(zip(rival.knob, rival.steps, strict=True))


@torch.no_grad()
def quality(
    name: str, two_sizes: str, images: int, steps: int, scale: float
) -> list[dict[str, Any]]:
    """All contenders' pictures of the same seeds, judged; likeness is to the full run."""
    pipe, judge = load_reference(two_sizes), reference_judge(name)
    pipe.set_progress_bar_config(disable=True)
    handle = low_band(pipe)
    labels, seeds = cyclic_labels(images, 10), list(range(images))
    rows: list[dict[str, Any]] = []
    full: Tensor | None = None
    for facts, draw in contenders(pipe, handle, steps, scale):
        parts = [
            draw(labels[at : at + BATCH], seeds[at : at + BATCH]) for at in range(0, images, BATCH)
        ]
        drawn = torch.cat(parts).float()
        rows.append(as_row(judge.judge(drawn, labels, sets=SETS, full=full), **facts))
        full = drawn if full is None else full
        shown = ("run", "ratio", "frechet", "accuracy", "psnr")
        print({k: rows[-1][k] for k in shown if k in rows[-1]}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", default="mnist")
    parser.add_argument("--base", default="mnist-two-sizes")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--scale", type=float, default=1.3)
    arguments = parser.parse_args()
    name, base = arguments.name, arguments.base
    levels = error_by_level(name, base, arguments.data, min(arguments.images, 256))
    rows = quality(name, base, arguments.images, arguments.steps, arguments.scale)
    facts = {key: getattr(arguments, key) for key in ("images", "steps", "scale", "base")}
    write_results(RESULTS / f"low-band-{name}.json", {**facts, "levels": levels, "rows": rows})


if __name__ == "__main__":
    main()
