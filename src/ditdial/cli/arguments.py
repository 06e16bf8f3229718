"""What commands make of their arguments: labels, references, schedules, the elastic pipeline."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditdial.plain.checks import did_you_mean

if TYPE_CHECKING:
    from ditdial.handle import Handle
    from ditdial.plan.mode import Mode
    from ditdial.plan.schedule import Schedule
    from ditdial.sampling.pixel_pipeline import PixelDiTPipeline

AdapterName = Annotated[
    str, typer.Option(help="lora, shared, ddit, ppflow, dydit, sparsedit, a folder.")
]
ModelName = Annotated[str, typer.Option(help="Reference model or pipeline folder.")]
ScheduleFile = Annotated[
    Path | None, typer.Option(help="A schedule as JSON, in place of the dial.")
]
Steps = Annotated[int, typer.Option(help="Sampling steps.")]


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


def parse_reference(text: str, weak: Mode) -> Schedule | None:
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
        return read_schedule(Path(text))
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


def read_schedule(path: Path | None) -> Schedule | None:
    """The schedule in a file; None for no file.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: no schedule.
    """
    from ditdial.plan.schedule import Schedule

    if path is None:
        return None
    if not path.exists():
        raise FileNotFoundError(f"schedule {str(path)!r} does not exist")
    return Schedule.from_json(path.read_text())


def pipeline(model: str) -> PixelDiTPipeline:
    """The stock pipeline of a command.

    Args:
        model: a reference model, or a folder of a pipeline.

    Raises:
        ValueError: neither of the two.
        OSError: a folder that holds no pipeline.
    """
    from diffusers.utils.logging import disable_progress_bar

    from ditdial.reference import load_reference, reference_names
    from ditdial.sampling.pixel_pipeline import PixelDiTPipeline

    disable_progress_bar()  # of the two parts of the pipeline, which are read in no time
    names = reference_names()
    if model in names:
        return load_reference(model)
    if Path(model).is_dir():
        return PixelDiTPipeline.from_pretrained(model)
    raise ValueError(
        f"model = {model!r}; legal: a reference model ({', '.join(names)}) or a pipeline folder"
        f"{did_you_mean(model, names)}"
    )


def elastic(model: str, adapter: str) -> tuple[PixelDiTPipeline, Handle]:
    """The pipeline of a command, made elastic.

    Args:
        model: as in `pipeline`.
        adapter: of a reference model, or a folder.

    Raises:
        ValueError: as in `pipeline`, or an adapter that does not fit.
        OSError: a folder that holds no pipeline or adapter.
    """
    from ditdial.elastify import elastify
    from ditdial.plan.execution import Execution

    pipe = pipeline(model)
    return pipe, elastify(pipe, adapter_folder(model, adapter), execution=Execution(merge=True))


def adapter_folder(model: str, adapter: str) -> Path:
    """Where an adapter is: its name is of a reference model's, unless it has a slash.

    Args:
        model: as in `pipeline`.
        adapter: ``lora``, ``shared`` or a method's name of a reference model, else a folder; with a
            slash it is always a folder (``./lora``).
    """
    from ditdial.reference import reference_adapter

    return reference_adapter(adapter, model) if is_shipped(model, adapter) else Path(adapter)


def is_shipped(model: str, adapter: str) -> bool:
    """Whether an adapter is one of the package's own; its folder is nobody's to write into.

    Args:
        model, adapter: as in `adapter_folder`.
    """
    from ditdial.reference import reference_names

    return model in reference_names() and "/" not in adapter


def output_file(path: Path) -> Path:
    """A file that a command will write, refused before its work rather than after it.

    Raises:
        OSError: a folder is in its place, or its own cannot be made or written into.
    """
    if path.is_dir():
        raise _refusal(IsADirectoryError, errno.EISDIR, path)
    output_folder(path.parent)
    return path


def output_folder(path: Path) -> Path:
    """A folder that a command will write into, refused before its work rather than after it.

    Raises:
        OSError: it is no folder, or cannot be made or written into.
    """
    existing: Any = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise _refusal(NotADirectoryError, errno.ENOTDIR, existing)
    if not os.access(existing, os.W_OK):
        raise _refusal(PermissionError, errno.EACCES, existing)
    return path


def _refusal(kind: type[OSError], number: int, path: Path) -> OSError:
    return kind(number, os.strerror(number), str(path))
