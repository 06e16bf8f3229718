"""The whole story on a laptop: the same seeds at full, about 64 %, 46 % and 30 % of the cost.

The reference model is sampled at each cost, one picture and one table are written, and nothing is
downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditdial.elastify import elastify
from ditdial.evaluation.contenders import Contender, Pictures, draw_in_turn
from ditdial.evaluation.picture import Row, comparison
from ditdial.evaluation.runner import as_row
from ditdial.evaluation.sheet import save_png
from ditdial.measure.provenance import write_results
from ditdial.plain import figures, files
from ditdial.plain.checks import require
from ditdial.plan.execution import Execution
from ditdial.plan.schedule import Schedule
from ditdial.reference import (
    load_reference,
    reference_adapter,
    reference_judge,
    reference_settings,
)

FIRST_SEED = 10_000
OWN_LEVELS = "the scheduler's own noise levels, from 1 to 0.001, the last of which moves nothing"
"""What results that do not tell ran at."""

SHOWN = 12
"""Pictures of each line in ``samples.png``."""


def demo_rows(settings: dict[str, Any]) -> dict[str, Contender]:
    """The demo's lines by name, the full run first.

    Their guidance scales are tuned on other seeds than the ones shown.
    """
    rows = {}
    for entry in settings["demo"]:
        schedule = Schedule.weak_first(entry["fraction"], guide_fraction=entry["guide_fraction"])
        rows[entry["name"]] = Contender(schedule, entry["scale"])
    return rows


def run_demo(
    output: str | Path, *, images: int = 400, batch_size: int = 80, sets: int = 4
) -> dict[str, Any]:
    """Sample, judge and draw; writes ``samples.png``, ``table.md`` and ``results.json``.

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
    settings = reference_settings()
    steps, rows = settings["steps"], demo_rows(settings)
    pipe = load_reference()
    pictures = Pictures.counted(pipe, images, FIRST_SEED)
    with elastify(pipe, reference_adapter("lora"), execution=Execution(merge=True)) as handle:
        draw_in_turn(
            pipe, handle, list(rows.values()), pictures, steps=steps, batch_size=batch_size
        )
    table = _judged(rows, pictures.labels, sets)
    shown = [
        Row(_label(line), row.images[:SHOWN], row.plan)
        for row, line in zip(rows.values(), table, strict=True)
    ]
    save_png(output / "samples.png", comparison(shown))
    files.write(output / "table.md", markdown(table))
    facts = {"images": images, "steps": steps, "levels": table[0]["levels"], "sets": sets}
    results = {**facts, "rows": table}
    write_results(output / "results.json", results)
    return results


def _judged(rows: dict[str, Contender], labels: list[int], sets: int) -> list[dict[str, Any]]:
    """One line of results for each row, compared with the first."""
    judge, full = reference_judge(), next(iter(rows.values()))
    return [
        as_row(
            judge.judge(row.images, labels, sets=sets, full=None if row is full else full.images),
            name=name,
            scale=row.scale,
            levels=row.levels,
            gmacs=row.plan.macs / 1e9,
            ratio=row.plan.ratio,
            ratio_measured=row.ratio,
            seconds=row.seconds,
            time_ratio=row.seconds / full.seconds,
            modes=[[s.mode.name, s.guide.name if s.guide else None] for s in row.plan.steps],
        )
        for name, row in rows.items()
    ]


def _label(line: dict[str, Any]) -> str:
    return (
        f"{line['name']}\n{figures.share(line['ratio'])} of the FLOPs\n"
        f"{figures.share(line['time_ratio'])} of the time\n"
        f"accuracy {figures.share(line['accuracy'])}"
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """The demo's table."""
    lines = [
        "| run | per picture | of the FLOPs | time | of the time | Frechet distance | "
        "accuracy | PSNR to full |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        similar = f"{figures.number(row['psnr'])} dB" if "psnr" in row else figures.UNKNOWN
        lines.append(
            f"| {row['name']} | {figures.macs(1e9 * row['gmacs'])} | {figures.share(row['ratio'])} "
            f"| {figures.seconds(row['seconds'])} | {figures.share(row['time_ratio'])} "
            f"| {figures.number(row['frechet'])} ± {figures.number(row['frechet_noise'])} "
            f"| {figures.share(row['accuracy'])} ± {figures.share(row['accuracy_noise'])} "
            f"| {similar} |"
        )
    ran = figures.levels(*rows[0]["levels"]) if "levels" in rows[0] else OWN_LEVELS
    return "\n".join([*lines, "", f"Steps at {ran}."]) + "\n"
