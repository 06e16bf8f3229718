"""The command line: thin; each command reads its arguments, calls the library and prints."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ditdial.measure.memory import keep_freed_memory

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Let a pretrained Diffusion Transformer change how much work it does at every step.",
)
console = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
AdapterName = Annotated[
    str, typer.Option(help="lora, shared, ddit, ppflow, dydit, sparsedit, a folder.")
]
ScheduleFile = Annotated[
    Path | None, typer.Option(help="A schedule as JSON, in place of the dial.")
]
CALIBRATION_SEED = 1_000_000
"""Of the first picture of a calibration; plans must not be judged on the pictures behind them."""

CALIBRATION_BATCH = 32
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, ImportError, FloatingPointError)


def main() -> None:
    """Entry point: bad input ends with one clear line and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    keep_freed_memory()
    try:
        app()
    except USER_ERRORS as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _print(rows: Sequence[dict[str, Any]], columns: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(list(rows), indent=2))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    console.print(table)


def _print_facts(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    rows = [{"quantity": key, "value": value} for key, value in facts.items()]
    _print(rows, ("quantity", "value"), as_json=False)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("out/demo"),
    images: Annotated[int, typer.Option(help="Pictures per budget.")] = 400,
    as_json: AsJson = False,
) -> None:
    """Sample the reference model at four costs and write picture, table and JSON."""
    from ditdial.demo import run_demo

    results = run_demo(output, images=images)
    columns = ("name", "gmacs", "ratio", "seconds", "time_ratio", "frechet", "accuracy", "psnr")
    _print(results["rows"], columns, as_json=as_json)
    if not as_json:
        console.print(f"picture, table and numbers: {output}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe, as in recipes/.")],
    output: Annotated[str, typer.Option(help="Replaces the recipe's output folder.")] = "",
    data: Annotated[str, typer.Option(help="Replaces data.path: a folder or a hub id.")] = "",
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="table.key=value; may be repeated.")
    ] = None,
) -> None:
    """Run a training recipe; under `accelerate launch` on several devices."""
    from ditdial.training.config import load_recipe
    from ditdial.training.data import ImageData
    from ditdial.training.loop import check_output
    from ditdial.training.loop import train as run
    from ditdial.training.tasks import build_task

    overrides = list(override or [])
    overrides += [f"output={json.dumps(output)}"] if output else []
    overrides += [f"data.path={json.dumps(data)}"] if data else []
    loaded = load_recipe(recipe, overrides)
    check_output(loaded, resume=resume)
    export = run(loaded, build_task(loaded), ImageData(loaded.data), resume=resume)
    console.print(f"exported to {export}")


@app.command()
def sample(
    output: Annotated[Path, typer.Argument(help="Folder for the pictures and report.json.")],
    labels: Annotated[str, typer.Option(help="Classes, as in 0,1,2 or 0-9.")] = "0-9",
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others count up.")] = 0,
    adapter: AdapterName = "lora",
    budget: Annotated[float, typer.Option(help="Share of the full cost, in (0, 1].")] = 1.0,
    tau: Annotated[
        float | None, typer.Option(help="DDiT's threshold; --budget is then its cap.")
    ] = None,
    schedule: ScheduleFile = None,
    guidance_scale: Annotated[float, typer.Option(help="1 turns guidance off.")] = 2.0,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 25,
    model: Annotated[str, typer.Option(help="Reference model or pipeline folder.")] = "mnist",
) -> None:
    """Sample pictures at a budget; each depends on its own seed alone."""
    from ditdial.evaluation.picture import decisions
    from ditdial.evaluation.sheet import save_png
    from ditdial.plan.ddit import DDiTController
    from ditdial.sampling.batches import sample as draw

    classes = parse_labels(labels)
    given = _read_schedule(schedule)
    if given is not None and tau is not None:
        raise ValueError("--schedule and --tau are both given; legal: one of them")
    pipe, handle = _elastic(model, adapter)
    if given is not None:
        handle.schedule = given
    elif tau is not None:
        coarse = tuple(mode for mode in handle.modes[1:] if mode == mode.patch)
        handle.controller = DDiTController(tau=tau, coarse=coarse, cap=budget)
    else:
        handle.budget = budget
    seeds = list(range(seed, seed + len(classes)))
    drawn = draw(pipe, classes, seeds, guidance_scale=guidance_scale, steps=steps)
    output.mkdir(parents=True, exist_ok=True)
    for image, label, number in zip(drawn.images, classes, seeds, strict=True):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        save_png(output / f"class{label}-seed{number}.png", pixels)
    report = handle.report()
    (output / "report.json").write_text(report.to_json())
    save_png(output / "decisions.png", decisions(report))
    console.print(f"{len(classes)} pictures at {report.ratio:.1%} of the full cost: {output}")


@app.command("eval")
def evaluate(
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("out/eval.json"),
    adapter: AdapterName = "lora",
    weak_fraction: Annotated[float, typer.Option(help="Share of noise levels run weak.")] = 0.48,
    guidance: Annotated[str, typer.Option(help="cfg or weak.")] = "cfg",
    schedule: ScheduleFile = None,
    guidance_scale: Annotated[float, typer.Option(help="The pipeline's scale.")] = 2.0,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 25,
    images: Annotated[int, typer.Option(help="Pictures in all.")] = 1000,
    sets: Annotated[int, typer.Option(help="Disjoint seed sets for the noise.")] = 4,
    model: Annotated[str, typer.Option(help="Reference model.")] = "mnist",
    as_json: AsJson = False,
) -> None:
    """Measure one schedule: distances, accuracy, likeness to the full run, cost, seconds."""
    from ditdial.evaluation.measure import measure
    from ditdial.measure.provenance import write_results
    from ditdial.plan.schedule import Schedule
    from ditdial.reference import reference_judge

    chosen = _read_schedule(schedule) or Schedule.weak_first(weak_fraction, guidance=guidance)
    pipe, handle = _elastic(model, adapter)
    handle.schedule = chosen  # refused here, before any work, if the adapter lacks a mode
    row = measure(
        pipe,
        handle,
        reference_judge(model),
        chosen,
        scale=guidance_scale,
        steps=steps,
        images=images,
        sets=sets,
    )
    write_results(output, {"rows": [row]})
    columns = ("ratio", "time_ratio", "frechet", "frechet_noise", "accuracy", "psnr")
    _print([row], columns, as_json=as_json)


@app.command()
def calibrate(
    output: Annotated[
        Path | None, typer.Option(help="File to write; in the adapter's folder by default.")
    ] = None,
    adapter: AdapterName = "lora",
    guidance_scale: Annotated[float, typer.Option(help="1 turns guidance off.")] = 2.0,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 25,
    images: Annotated[int, typer.Option(help="Pictures in all.")] = 32,
    reference: Annotated[
        str,
        typer.Option(
            help="What choices are compared with: cfg, weak:LEVEL for weak guidance below a noise "
            "level, or a schedule file."
        ),
    ] = "cfg",
    bands: Annotated[int, typer.Option(help="Stretches to measure final pictures in.")] = 0,
    model: Annotated[str, typer.Option(help="Reference model or pipeline folder.")] = "mnist",
    only_seconds: Annotated[
        bool, typer.Option("--only-seconds", help="Keep the errors, time this device.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a calibration.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what each mode loses at each noise level and takes on this device."""
    from ditdial.checks import require
    from ditdial.plan.calibration import FILE, Calibration
    from ditdial.sampling.batches import cyclic_labels
    from ditdial.sampling.batches import sample as draw

    require(images >= 1, "images", images, ">= 1")
    require(steps >= 1, "steps", steps, ">= 1")
    path = output or _adapter_folder(model, adapter) / FILE
    if path.exists() and not (force or only_seconds):
        raise FileExistsError(f"{str(path)!r} exists; --force replaces it")
    pipe, handle = _elastic(model, adapter)
    aim = parse_reference(reference, handle.modes[1])
    if only_seconds:
        if aim is not None:
            raise ValueError(
                f"reference = {reference!r} with --only-seconds, which keeps the errors"
            )
        handle.calibration = Calibration.load(path)
    labels = cyclic_labels(images, pipe.transformer.config.num_embeds_ada_norm)
    seeds = list(range(CALIBRATION_SEED, CALIBRATION_SEED + images))
    batches = -(-images // CALIBRATION_BATCH)

    def sample(batch: int) -> None:
        part = slice(batch * CALIBRATION_BATCH, (batch + 1) * CALIBRATION_BATCH)
        draw(pipe, labels[part], seeds[part], guidance_scale=guidance_scale, steps=steps)

    facts = {"first_seed": CALIBRATION_SEED, "labels": "in turn"}
    settings: dict[str, Any] = {"guidance_scale": guidance_scale, "reference": aim, "bands": bands}
    settings = {} if only_seconds else {**settings, "batches": batches, "data": facts}
    measured = handle.calibrate(sample, only_seconds=only_seconds, **settings)
    measured.save(path)
    rows = []
    for point in measured.points:
        errors = dict(zip(measured.names, point.step_error, strict=True))
        rows.append({"level": point.level, "u": float(measured.u([point.level])[0]), **errors})
    if as_json:
        _print(rows, (), as_json=True)
        return
    lines = str.maketrans("/ ", "\n\n")
    shown = [{k.translate(lines): f"{v:.2g}" for k, v in row.items()} for row in rows]
    _print(shown, tuple(shown[0]), as_json=False)
    console.print(f"squared errors of the predicted clean latents; calibration: {path}")


@app.command()
def cost(
    model: Annotated[str, typer.Option(help="Published model, or a reference model.")],
    weak_fraction: Annotated[float, typer.Option(help="Share of the steps run weak.")] = 0.48,
    guide_fraction: Annotated[
        float | None, typer.Option(help="The same for the guidance branch.")
    ] = None,
    scale: Annotated[int, typer.Option(help="Weak patch, in base patches per axis.")] = 2,
    low_rank: Annotated[int, typer.Option(help="Rank of unmerged low-rank updates.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps, evenly spaced.")] = 250,
    method: Annotated[str, typer.Option(help="flexidit (weak first), or sparsedit.")] = "flexidit",
    sides: Annotated[str, typer.Option(help="Of sparsedit's grids, as in 6,7,8,10.")] = "",
    as_json: AsJson = False,
) -> None:
    """What a run costs, in closed form; MACs are per forward pass of one picture."""
    from ditdial import FlexiDiT, Schedule
    from ditdial.published.costs import run_cost, sparse_plan
    from ditdial.published.models import Published
    from ditdial.reference import load_reference, reference_names

    if method == "sparsedit":
        numbers = tuple(parse_labels(sides, "sides")) if sides else ()
        facts = run_cost(model, sparse_plan(model, numbers), steps=steps)
    elif method == "flexidit":
        reference = model in reference_names()
        known = Published.of(load_reference(model).transformer) if reference else model
        facts = run_cost(
            known,
            FlexiDiT(scales=(scale,), rank=low_rank or 32),
            Schedule.weak_first(weak_fraction, scale, guide_fraction=guide_fraction),
            steps=steps,
            merged=not low_rank,
        )
    else:
        raise ValueError(f"method {method!r}; legal: flexidit, sparsedit")
    _print_facts(facts | {"model": model}, as_json=as_json)


@app.command()
def probe(
    target: Annotated[
        str, typer.Argument(help="A diffusers class, a published model, or a model's folder.")
    ],
    as_json: AsJson = False,
) -> None:
    """Say whether a model can be made elastic, and what its coarse modes would cost."""
    from ditdial.published.probe import probe as look

    facts = look(target)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    rows = [{"fact": k, "value": _plain(v)} for k, v in facts.items() if k != "cost"]
    _print(rows, ("fact", "value"), as_json=False)
    if facts.get("cost"):
        _print(facts["cost"], ("mode", "tokens", "macs", "ratio"), as_json=False)


def _plain(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="report.json or results.json of a run.")],
    as_json: AsJson = False,
) -> None:
    """Print what a run did: one line per model call, or one per row of results."""
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist")
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(data, dict) or not ({"calls", "rows"} & set(data)):
        raise ValueError(f"{str(path)!r} is no report; legal: JSON with 'calls' or 'rows'")
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    rows = data.get("calls") or data["rows"]
    columns = [key for key, value in rows[0].items() if not isinstance(value, list | dict)]
    _print(rows, columns, as_json=False)
    if "ratio" in data:
        console.print(f"{data['ratio']:.1%} of the full cost, {data['seconds']:.3f} s in the model")


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods that work."""
    from ditdial.methods import METHODS

    rows = [
        {"name": name, "status": "works", "paper": method.paper, "recipes": method.recipes}
        for name, method in METHODS.items()
    ]
    _print(rows, ("name", "status", "paper", "recipes"), as_json=as_json)


@app.command()
def backbones(as_json: AsJson = False) -> None:
    """List the diffusers model classes that work."""
    from ditdial.backbones import BACKBONES

    rows = [{"name": name, "status": "works"} for name in BACKBONES]
    _print(rows, ("name", "status"), as_json=as_json)


def parse_labels(text: str, name: str = "labels") -> list[int]:
    """``0,3,5-7`` -> ``[0, 3, 5, 6, 7]``.

    Args:
        name: of the option, for errors.

    Raises:
        ValueError: not numbers and ranges.
    """
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{name} = {text!r}; legal: numbers and ranges, as in 0,3,5-7")
        labels += range(int(first), int(last or first) + 1)
    return labels


def parse_reference(text: str, weak: Any) -> Any:
    """``cfg`` -> None, ``weak:0.8`` -> weak guidance below this noise level, else a schedule file.

    Args:
        weak: the mode that guides.

    Raises:
        ValueError: none of these, or a level outside (0, 1].
    """
    from ditdial.plan.schedule import Schedule

    kind, _, level = text.partition(":")
    if text == "cfg":
        return None
    if kind != "weak" and Path(text).is_file():
        return _read_schedule(Path(text))
    try:
        below = float(level) if kind == "weak" else 0.0
    except ValueError:
        below = 0.0
    if not 0 < below <= 1:
        raise ValueError(
            f"reference = {text!r}; legal: 'cfg', 'weak:LEVEL' with a noise level in (0, 1], or a "
            "schedule file"
        )
    return Schedule.weak_guidance_below(below, weak)


def _read_schedule(path: Path | None) -> Any:
    from ditdial.plan.schedule import Schedule

    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"schedule {str(path)!r} does not exist")
    return Schedule.from_json(path.read_text())


def _elastic(model: str, adapter: str) -> tuple[Any, Any]:
    from ditdial.elastify import elastify
    from ditdial.reference import load_reference, reference_names
    from ditdial.sampling.pixel_pipeline import PixelDiTPipeline

    if model in reference_names():
        pipe = load_reference(model)
    elif Path(model).is_dir():
        pipe = PixelDiTPipeline.from_pretrained(model)
    else:
        names = ", ".join(reference_names())
        raise ValueError(
            f"model {model!r}; legal: a reference model ({names}) or a pipeline folder"
        )
    return pipe, elastify(pipe, _adapter_folder(model, adapter), merge=True)


def _adapter_folder(model: str, adapter: str) -> Path:
    from ditdial.reference import reference_adapter, reference_names

    named = model in reference_names() and "/" not in adapter
    return reference_adapter(adapter, model) if named else Path(adapter)
