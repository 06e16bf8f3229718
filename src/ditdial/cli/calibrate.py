"""``ditdial calibrate``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditdial.cli.arguments import (
    AdapterName,
    ModelName,
    Revision,
    Steps,
    adapter_source,
    elastic,
    is_shipped,
    output_file,
    parse_reference,
)
from ditdial.cli.tables import AsJson, Column, print_json, print_table, say
from ditdial.plain.checks import whole

if TYPE_CHECKING:
    from ditdial.plan.calibration import Calibration
    from ditdial.sampling.pixel_pipeline import PixelDiTPipeline

FIRST_SEED = 1_000_000
"""Of the pictures of a calibration; plans must not be judged on the pictures behind them."""

BATCH = 32


def calibrate(
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; in the adapter's folder by default, if that is yours."),
    ] = None,
    adapter: AdapterName = "lora",
    revision: Revision = None,
    guidance_scale: Annotated[float, typer.Option(help="1 turns guidance off.")] = 2.0,
    steps: Steps = 25,
    images: Annotated[int, typer.Option(help="Pictures in all.")] = 32,
    reference: Annotated[
        str,
        typer.Option(
            help="What choices are compared with: cfg, weak:LEVEL for weak guidance below a noise "
            "level, or a schedule file."
        ),
    ] = "cfg",
    bands: Annotated[int, typer.Option(help="Stretches to measure final pictures in.")] = 0,
    model: ModelName = "mnist",
    only_seconds: Annotated[
        bool, typer.Option("--only-seconds", help="Keep the errors, time this device.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a calibration.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what each mode loses at each noise level and takes on this device.

    Adapters that ship with the package are not changed: a calibration of one needs --output, and
    seconds of one are kept in your cache folder.
    """
    from ditdial.evaluation.contenders import MOST_PICTURES
    from ditdial.plan.calibration import Calibration
    from ditdial.plan.kept_seconds import keep
    from ditdial.plan.plan import MOST_STEPS

    whole("images", images, 1, MOST_PICTURES)
    whole("steps", steps, 1, MOST_STEPS)
    whole("bands", bands, 0, steps)
    source = adapter_source(model, adapter, revision)
    shipped = output is None and is_shipped(model, adapter)
    path = _place(source, output, shipped=shipped and not only_seconds)
    path = path if shipped else output_file(path)
    if path.exists() and not (force or only_seconds):
        raise FileExistsError(f"{str(path)!r} exists; --force replaces it")
    pipe, handle = elastic(model, adapter, revision)
    aim = parse_reference(reference, handle.modes[1])
    settings: dict[str, Any] = {}
    if not only_seconds:
        facts = {"first_seed": FIRST_SEED, "labels": "in turn"}
        settings = {"guidance_scale": guidance_scale, "reference": aim, "bands": bands}
        settings |= {"batches": -(-images // BATCH), "data": facts}
    elif aim is not None:
        raise ValueError(f"reference = {reference!r} with --only-seconds, which keeps the errors")
    elif path.exists() or isinstance(source, Path) or handle.calibration is None:
        handle.calibration = Calibration.load(path)
    sample = _sampler(pipe, images, guidance_scale=guidance_scale, steps=steps)
    measured = handle.calibrate(sample, only_seconds=only_seconds, **settings)
    _show(measured, keep(measured) if shipped else measured.save(path), as_json=as_json)


def _place(source: Path | str, output: Path | None, *, shipped: bool) -> Path:
    """Where a calibration of an adapter is written.

    Args:
        source: of the adapter: a folder, or a hub id.
        shipped: whether it is one of the package's own, whose folder is not the user's.

    Raises:
        ValueError: no file is given for an adapter whose folder cannot be written into.
    """
    from ditdial.plan.calibration import FILE

    if output is None and isinstance(source, str):
        raise ValueError(f"output = None for adapter {source!r} of the hub; legal: a file to write")
    if shipped:
        raise ValueError(
            f"output = None; legal for adapter {Path(source).name!r}, which ships with the "
            "package: a file to write (Calibration.load reads it, for handle.calibration)"
        )
    return output or Path(source) / FILE


def _sampler(
    pipe: PixelDiTPipeline, images: int, *, guidance_scale: float, steps: int
) -> Callable[[int], None]:
    """``sample(batch)`` draws one batch of the calibration's pictures, classes in turn."""
    from ditdial.sampling.batches import cyclic_labels
    from ditdial.sampling.batches import sample as draw

    labels = cyclic_labels(images, pipe.transformer.config.num_embeds_ada_norm)
    seeds = list(range(FIRST_SEED, FIRST_SEED + images))

    def sample(batch: int) -> None:
        part = slice(batch * BATCH, (batch + 1) * BATCH)
        draw(pipe, labels[part], seeds[part], guidance_scale=guidance_scale, steps=steps)

    return sample


def _show(measured: Calibration, path: Path, *, as_json: bool) -> None:
    rows = []
    for point in measured.points:
        errors = dict(zip(measured.names, point.step_error, strict=True))
        rows.append({"level": point.level, "u": float(measured.u([point.level])[0]), **errors})
    if as_json:
        print_json(rows)
        return
    lines = str.maketrans("/ ", "\n\n")
    print_table(rows, [Column(key, key.translate(lines)) for key in rows[0]])
    say(f"squared errors of the predicted clean latents; calibration: {path}")
