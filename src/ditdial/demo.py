"""The whole story on a laptop: the same seeds at full, about 64 %, 46 % and 30 % of the cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditdial.checks import require
from ditdial.elastify import elastify
from ditdial.evaluation.picture import Row, comparison
from ditdial.evaluation.runner import as_row
from ditdial.evaluation.sheet import save_png
from ditdial.measure.provenance import write_results
from ditdial.plan.execution import Execution
from ditdial.plan.schedule import Schedule
from ditdial.reference import (
    load_reference,
    reference_adapter,
    reference_judge,
    reference_settings,
)
from ditdial.sampling.batches import cyclic_labels, sample

FIRST_SEED = 10_000


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo: a name, a schedule (None for the stock model) and a guidance scale."""

    name: str
    schedule: Schedule | None
    scale: float


def demo_rows(settings: dict[str, Any]) -> list[DemoRow]:
    """The demo's lines, with guidance scales tuned on other seeds than the ones shown."""
    rows = []
    for entry in settings["demo"]:
        schedule = Schedule.weak_first(entry["fraction"], guide_fraction=entry["guide_fraction"])
        rows.append(DemoRow(entry["name"], schedule, entry["scale"]))
    return rows


def run_demo(
    output: str | Path, *, images: int = 400, batch_size: int = 80, sets: int = 4
) -> dict[str, Any]:
    """Sample, judge and draw; writes ``samples.png``, ``table.md`` and ``results.json``.

    The lines are sampled in turn, batch by batch, so that a busy machine is unfair to none of them.

    Args:
        images: pictures per line.
        sets: disjoint sets of seeds that give the metrics' own noise.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: too few images for the sets.
    """
    require(images >= 20 * sets, "images", images, f">= {20 * sets} (20 for each of {sets} sets)")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    settings, judge = reference_settings(), reference_judge()
    steps = settings["steps"]
    pipe = load_reference()
    handle = elastify(pipe, reference_adapter("lora"), execution=Execution(merge=True))
    rows = demo_rows(settings)
    labels = cyclic_labels(images, pipe.transformer.config.num_embeds_ada_norm)
    seeds = list(range(FIRST_SEED, FIRST_SEED + images))

    pictures: dict[str, list[torch.Tensor]] = {row.name: [] for row in rows}
    seconds = dict.fromkeys(pictures, 0.0)
    plans, macs = {}, {}
    for start in range(0, images, batch_size):
        part = slice(start, start + batch_size)
        for row in rows:
            handle.schedule = row.schedule or Schedule.constant()
            plans[row.name] = handle.plan(steps, guidance=row.scale != 1)
            drawn = sample(
                pipe,
                labels[part],
                seeds[part],
                guidance_scale=row.scale,
                steps=steps,
                batch_size=batch_size,
            )
            pictures[row.name].append(drawn.images)
            seconds[row.name] += drawn.seconds
            macs[row.name] = handle.report().ratio
    handle.remove()

    joined = {name: torch.cat(parts) for name, parts in pictures.items()}
    first = rows[0].name
    table = []
    for row in rows:
        full = None if row.name == first else joined[first]
        figures = judge.judge(joined[row.name], labels, sets=sets, full=full)
        table.append(
            as_row(
                figures,
                name=row.name,
                scale=row.scale,
                gmacs=plans[row.name].macs / 1e9,
                ratio=plans[row.name].ratio,
                ratio_measured=macs[row.name],
                seconds=seconds[row.name],
                time_ratio=seconds[row.name] / seconds[first],
                modes=[
                    [s.mode.name, s.guide.name if s.guide else None] for s in plans[row.name].steps
                ],
            )
        )
    shown = [
        Row(_label(line), joined[row.name][:12], plans[row.name])
        for row, line in zip(rows, table, strict=True)
    ]
    save_png(output / "samples.png", comparison(shown))
    (output / "table.md").write_text(markdown(table))
    results = {"images": images, "steps": steps, "sets": sets, "rows": table}
    write_results(output / "results.json", results)
    return results


def _label(line: dict[str, Any]) -> str:
    return (
        f"{line['name']}\n{line['ratio']:.0%} of the FLOPs\n{line['time_ratio']:.0%} of the time\n"
        f"accuracy {line['accuracy']:.1%}"
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """The demo's table."""
    lines = [
        "| run | GMAC per picture | FLOPs ratio | seconds | time ratio | Frechet distance | "
        "accuracy | PSNR to full |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        similar = f"{row['psnr']:.1f} dB" if "psnr" in row else "-"
        lines.append(
            f"| {row['name']} | {row['gmacs']:.2f} | {row['ratio']:.3f} | {row['seconds']:.1f} | "
            f"{row['time_ratio']:.3f} | {row['frechet']:.2f} ± {row['frechet_noise']:.2f} | "
            f"{row['accuracy']:.1%} ± {row['accuracy_noise']:.1%} | {similar} |"
        )
    return "\n".join(lines) + "\n"
