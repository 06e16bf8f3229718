"""Write the tables of README.md and benchmarks/README.md from the JSON under benchmarks/results/.

    python benchmarks/tables.py

Only what stands between the markers is replaced.
"""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

from ditdial.demo import OWN_LEVELS, markdown

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def main() -> None:
    demo = load("demo-mnist.json")
    replace(HERE.parent / "README.md", "demo-table", markdown(demo["rows"]) + source(demo))
    parts = []
    kinds = {
        "speed-cpu": "eager",
        "speed-cpu-kept-pages": "eager, freed memory kept",
        "speed-cpu-compiled": "compiled",
    }
    for name, title in kinds.items():
        if (RESULTS / f"{name}.json").exists():
            speed = load(f"{name}.json")
            head = f"## Do seconds follow FLOPs? ({title})\n\n"
            parts.append(head + speed_tables(speed) + source(speed))
    overhead = load("overhead-cpu.json")
    parts.append(
        "## What full mode adds to the stock forward\n\n"
        + overhead_table(overhead)
        + source(overhead)
    )
    table = load("reference-mnist.json")
    figure = "![Quality over FLOPs and over seconds](../docs/images/pareto.png)\n\n"
    parts.append("## Quality over cost\n\n" + figure + quality_table(table) + source(table))
    card = HERE.parent / "src" / "ditdial" / "reference" / "mnist" / "README.md"
    chosen = ("base", "lora/cfg/0.4", "lora/weak/0.2", "lora/cfg/1.0", "shared/cfg/0.4")
    rows = [row for row in table["rows"] if row["key"] in chosen]
    replace(card, "card", quality_table(table | {"rows": rows}))
    spent = load("frontier-mnist.json")
    figure = "![Frontier of plans](../docs/images/frontier.png)\n\n"
    parts.append("## How to spend a budget\n\n" + figure + frontier_table(spent) + source(spent))
    steps = load("steps-cost.json")
    parts.append(
        "## Does a budget cost the same in other runs?\n\n" + steps_table(steps) + source(steps)
    )
    parts.append("## Who takes how much\n\n" + spread_table(spent) + source(spent))
    for name, title in (
        ("routed", "Routed widths (DyDiT)"),
        ("sparsedit", "Sparse grids (SparseDiT)"),
    ):
        if (RESULTS / f"{name}-mnist.json").exists():
            trained = load(f"{name}-mnist.json")
            parts.append(f"## {title}\n\n" + trained_table(trained) + source(trained))
    for name, title in (("routed-speed-cpu", "eager"), ("routed-speed-cpu-compiled", "compiled")):
        if (RESULTS / f"{name}.json").exists():
            speed = load(f"{name}.json")
            head = f"## Is routed width as fast as it is narrow? ({title})\n\n"
            parts.append(head + routed_speed_tables(speed) + source(speed))
    if (RESULTS / "sparsedit-speed-cpu.json").exists():
        speed = load("sparsedit-speed-cpu.json")
        head = "## Are sparse grids as fast as they are sparse? (SparseDiT)\n\n"
        parts.append(head + sparse_speed_table(speed) + source(speed))
    if (RESULTS / "routed-rows-cpu.json").exists():
        few = load("routed-rows-cpu.json")
        head = "## Does gathering tokens pay for few rows?\n\n"
        parts.append(head + rows_table(few) + source(few))
    levels = load("level-error-mnist.json")
    parts.append(
        "## Error of each mode over noise levels\n\n" + level_table(levels) + source(levels)
    )
    replace(HERE / "README.md", "results", "\n".join(parts))


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def source(results: dict[str, Any]) -> str:
    facts = results["provenance"]
    return f"\n`{facts['command']}` at {facts['commit']}, {facts['device']}, {facts['date']}.\n"


def speed_tables(speed: dict[str, Any]) -> str:
    lines = []
    for table in speed["tables"]:
        lines += [f"Batch {table['batch']}, {speed['steps']} steps, with guidance:", ""]
        lines += ["| run | FLOPs ratio | time ratio | in each process |", "| --- " * 4 + "|"]
        for row in table["rows"]:
            spread = f"{row['least']:.3f} to {row['most']:.3f}"
            lines.append(
                f"| {row['run']} | {row['flops_ratio']:.3f} | {row['time_ratio']:.3f} | {spread} |"
            )
        lines.append("")
    lines += [f"Processes: {speed['processes']}.", ""]
    return "\n".join(lines)


def overhead_table(overhead: dict[str, Any]) -> str:
    lines = [
        "The classes of published models with a few narrow blocks and a short sequence, each with "
        "and without its engine; medians of several processes.",
        "",
        "| model | time of full mode over stock | in each process |",
        "| --- | --- | --- |",
    ]
    for row in overhead["rows"]:
        spread = f"{min(row['ratios']):.3f} to {max(row['ratios']):.3f}"
        lines.append(f"| {row['model']}, reduced | {row['time_ratio']:.3f} | {spread} |")
    return "\n".join(lines) + "\n"


def quality_table(table: dict[str, Any]) -> str:
    lines = [
        f"{table['images']} pictures a row in {table['sets']} seed sets, drawn in "
        f"{arithmetic(table['rows'])}; the guidance scale of each row is tuned on "
        f"{table['tune_images']} pictures of other seeds. ± is the standard error; all rows share "
        "their seeds, and differences are taken set by set. *Loss*: Frechet distance minus the "
        "base's. *Fewer steps*: the fewest full steps that take no less time, their distance, and "
        f"by how much the row is ahead of them. {steps_at(table['rows'])}",
        "",
        "| run | weak fraction | FLOPs | time | scale | Frechet distance | loss | fewer steps | "
        "ahead by | accuracy | PSNR to full |",
        "| --- " * 11 + "|",
    ]
    for row in table["rows"]:
        name = f"{row['series']}: {row['steps']}" if "fewer" in row["series"] else row["series"]
        fraction = f"{row['weak_fraction']:.1f}" if "weak_fraction" in row else "-"
        similar = f"{row['psnr']:.1f}" if "psnr" in row else "-"
        loss = plus_minus(row, "loss") if "loss" in row else "-"
        rival = f"{row['rival_steps']}: {row['rival_frechet']:.3f}" if "ahead" in row else "-"
        ahead = plus_minus(row, "ahead") if "ahead" in row else "-"
        lines.append(
            f"| {name} | {fraction} | {row['ratio']:.3f} | {row['time_ratio']:.3f} | "
            f"{row['scale']} | {row['frechet']:.3f} ± {row['frechet_noise']:.3f} | {loss} | "
            f"{rival} | {ahead} | {row['accuracy']:.2%} ± {row['accuracy_noise']:.2%} | "
            f"{similar} |"
        )
    return "\n".join(lines) + "\n"


def arithmetic(rows: list[dict[str, Any]]) -> str:
    """The dtype that rows were drawn in, and which rows were not."""
    usual = rows[0]["dtype"]
    others: dict[str, set[str]] = {}
    for row in rows:
        if row["dtype"] != usual:
            others.setdefault(row["dtype"], set()).add(row["series"])
    return usual + "".join(
        f" ({', '.join(sorted(series))}: {dtype})" for dtype, series in others.items()
    )


def frontier_table(table: dict[str, Any]) -> str:
    lines = [
        f"{table['images']} pictures a row in {table['sets']} seed sets at {table['steps']} steps, "
        f"drawn in {table['dtype']}; scales tuned on {table['tune_images']} pictures of other "
        "seeds. *Loss*: Frechet distance minus the base's; *against the best fixed*: minus that of "
        "the best hand-set schedule of the same budget; *against fewer steps*: minus that of as "
        "many full steps as the budget buys. All paired by seed set; less than zero is better. "
        f"{steps_at(table['rows'])}",
        "",
        "| plan | budget | FLOPs | time | scale | loss | against the best fixed | against fewer "
        "steps | accuracy |",
        "| --- " * 9 + "|",
    ]
    for row in sorted(table["rows"], key=lambda row: (row.get("budget", 1), row["series"])):
        cells = [
            plus_minus(row, name) if name in row else "-"
            for name in ("loss", "against_fixed", "against_steps")
        ]
        lines.append(
            f"| {row['series']} | {row.get('budget', '-')} | {row['ratio']:.3f} | "
            f"{row['time_ratio']:.3f} | {row['scale']} | {' | '.join(cells)} | "
            f"{row['accuracy']:.2%} |"
        )
    return "\n".join(lines) + "\n"


def spread_table(table: dict[str, Any]) -> str:
    lines = [
        "DDiT's choices, picture by picture: mean share of the full cost by class, and Spearman's "
        "rank correlation of a picture's cost with its detail (mean absolute gradient of the same "
        f"seed's full run). {steps_at(table['rows'])}",
        "",
        f"| run | {' | '.join(map(str, range(10)))} | least, median, most | correlation |",
        "| --- " * 13 + "|",
    ]
    rows = {row["key"]: row for row in table["rows"]}
    for spread in table["spreads"]:
        means = " | ".join(f"{mean:.2f}" for mean in spread["mean_by_class"])
        least, _, median, _, most = rows[spread["key"]]["cost_quartiles"]
        lines.append(
            f"| {spread['key']} | {means} | {least:.2f}, {median:.2f}, {most:.2f} | "
            f"{spread['correlation_with_detail']:+.2f} |"
        )
    return "\n".join(lines) + "\n"


def steps_table(steps: dict[str, Any]) -> str:
    lines = [
        "Planned shares of the full cost against those of 50 steps, for budgets in whole percents. "
        f"{steps_at([steps])}",
        "",
        "| guidance | run | budgets off by more than 1 % | most |",
        "| --- | --- | --- | --- |",
    ]
    for table in steps["tables"]:
        rows = table["rows"]
        for run in (name for name in rows[0] if name not in ("budget", "usual")):
            apart = [abs(row[run] - row["usual"]) for row in rows]
            over = f"{sum(each > 0.01 for each in apart)} of {len(rows)}"
            guided = "yes" if table["guided"] else "no"
            lines.append(f"| {guided} | {run} | {over} | {max(apart):.2%} |")
    return "\n".join(lines) + "\n"


def trained_table(table: dict[str, Any]) -> str:
    lines = [
        f"{table['images']} pictures a row in {table['sets']} seed sets at {table['steps']} steps; "
        f"scales tuned on {table['tune_images']} pictures of other seeds. *static*: the same "
        "weights trained as long on the data with nothing left out. *Loss*: Frechet distance minus "
        "the base's; *against static*, *against fewer steps*: minus the control's, and the base's, "
        "at the fewest steps that take no less time, and no fewer MACs. Paired by seed set; "
        f"less than zero is better. {steps_at(table['rows'])}",
        "",
        "| run | MACs | time | scale | Frechet distance | loss | against static, same time | "
        "same MACs | against fewer steps, same time | same MACs | accuracy |",
        "| --- " * 11 + "|",
    ]
    for row in table["rows"]:
        cells = [plus_minus(row, "loss") if "loss" in row else "-"]
        for kind, name in product(("static", "fewer-steps"), ("time", "cost")):
            key = f"against_{kind}_by_{name}"
            steps = row.get(f"rival_steps_by_{name}")
            cells.append(f"{plus_minus(row, key)} ({steps} steps)" if key in row else "-")
        lines.append(
            f"| {row['key']} | {row['ratio']:.3f} | {row['time_ratio']:.3f} | {row['scale']} | "
            f"{row['frechet']:.3f} ± {row['frechet_noise']:.3f} | {' | '.join(cells)} | "
            f"{row['accuracy']:.2%} |"
        )
    return "\n".join(lines) + "\n"


def routed_speed_tables(speed: dict[str, Any]) -> str:
    width = 72 * speed["heads"]
    lines = [f"One guided forward pass of {speed['depth']} blocks of width {width}.", ""]
    lines += ["| batch | run | MACs ratio | time ratio |", "| --- | --- | --- | --- |"]
    for table in speed["tables"]:
        for row in table["rows"]:
            ratios = f"{row['macs_ratio']:.3f} | {row['time_ratio']:.3f}"
            lines.append(f"| {table['batch']} | {row['run']} | {ratios} |")
    return "\n".join(lines) + "\n"


def sparse_speed_table(speed: dict[str, Any]) -> str:
    lines = [f"One forward pass of batch {speed['batch']}.", ""]
    lines += ["| model | mode | MACs ratio | in the paper's counting | time ratio |"]
    lines += ["| --- " * 5 + "|"]
    for model in speed["models"]:
        grid = " x ".join(str(side) for side in model["grid"] if side > 1)
        size = f"{model['model']}: {model['depth']} blocks of width {model['width']}, {grid} tokens"
        for row in model["rows"]:
            ratios = (row["macs_ratio"], row["macs_ratio_published"], row["time_ratio"])
            numbers = " | ".join(f"{ratio:.3f}" for ratio in ratios)
            lines.append(f"| {size} | {row['mode']} | {numbers} |")
    return "\n".join(lines) + "\n"


def rows_table(few: dict[str, Any]) -> str:
    lines = ["| rows | kept | time over all rows |", "| --- | --- | --- |"]
    for row in few["rows"]:
        lines.append(f"| {row['rows']} | {row['kept']:.2f} | {row['time_ratio']:.3f} |")
    return "\n".join(lines) + "\n"


def steps_at(rows: list[dict[str, Any]]) -> str:
    """Which noise levels rows ran at, in a sentence."""
    if all("levels" in row for row in rows):
        return "Steps at noise levels 1, (N - 1)/N, ..., 1/N, N of them."
    return f"Steps at {OWN_LEVELS}."


def plus_minus(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:+.3f} ± {row[f'{name}_noise']:.3f}"


def level_table(levels: dict[str, Any]) -> str:
    modes = [key for key in levels["rows"][0] if key not in ("adapter", "level")]
    lines = [f"| adapter | noise level | {' | '.join(modes)} |", "| --- " * (2 + len(modes)) + "|"]
    for row in levels["rows"]:
        errors = " | ".join(f"{row[mode]:.4f}" for mode in modes)
        lines.append(f"| {row['adapter']} | {row['level']} | {errors} |")
    return "\n".join(lines) + "\n"


def replace(path: Path, marker: str, text: str) -> None:
    old = path.read_text()
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{path} has no markers {marker!r}")
    path.write_text(pattern.sub(lambda m: m[1] + text + m[2], old))


if __name__ == "__main__":
    main()
