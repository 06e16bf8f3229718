"""What commands make of their arguments: labels, references, schedules, the elastic pipeline."""

from __future__ import annotations

import errno
import os
import re
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
    str, typer.Option(help="lora, shared, ddit, ppflow, dydit, sparsedit, a folder, a hub id.")
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of an adapter of the hub.")
]
ModelName = Annotated[str, typer.Option(help="Reference model or pipeline folder.")]
ScheduleFile = Annotated[
    Path | None, typer.Option(help="A schedule as JSON, in place of the dial.")
]
Steps = Annotated[int, typer.Option(help="Sampling steps.")]

LABELS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
MOST_LABELS = 100_000
"""Pictures that one command makes; all of them are in memory at its end."""


def parse_labels(text: str, name: str = "labels") -> list[int]:
    """``0,3,5-7`` -> ``[0, 3, 5, 6, 7]``.

    Args:
        name: of the option, for errors.

    Raises:
        ValueError: not numbers and ranges, or more than `MOST_LABELS` of them.
    """
    labels: list[int] = []
    for part in text.split(","):
        found = LABELS.fullmatch(part.strip())
        first, last = map(int, (found[1], found[2] or found[1])) if found else (0, MOST_LABELS)
        if len(labels) + last - first >= MOST_LABELS:
            legal = f"numbers and ranges, as in 0,3,5-7, at most {MOST_LABELS}"
            raise ValueError(f"{name} = {text!r}; legal: {legal}")
        labels += range(first, last + 1)
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

    return None if path is None else Schedule.load(path)


def pipeline(model: str) -> PixelDiTPipeline:
    """The stock pipeline of a command.

    Args:
        model: a reference model, or a folder of a pipeline.

    Raises:
        ValueError: neither of the two, or a folder of something else.
        OSError: a folder that lacks a file.
    """
    from diffusers.utils.logging import disable_progress_bar

    from ditdial.host.configs import check_folder
    from ditdial.measure.memory import flush_denormals
    from ditdial.reference import load_reference
    from ditdial.sampling.pixel_pipeline import PixelDiTPipeline

    flush_denormals()  # before anything is computed
    disable_progress_bar()  # of the two parts of the pipeline, which are read in no time
    if _is_reference(model):
        return load_reference(model)
    check_folder(Path(model))
    try:
        return PixelDiTPipeline.from_pretrained(model, use_safetensors=True)
    except OSError:
        raise
    except Exception as error:  # diffusers checks little of what it reads, and raises anything
        raise ValueError(f"model = {model!r} cannot be loaded as a pipeline: {error!r}") from error


def _is_reference(model: str) -> bool:
    """Whether a model is one of the package's own; else it is a folder.

    Raises:
        ValueError: neither of the two.
    """
    from ditdial.reference import reference_names

    names = reference_names()
    if model not in names and not Path(model).is_dir():
        raise ValueError(
            f"model = {model!r}; legal: a reference model ({', '.join(names)}) or a pipeline folder"
            f"{did_you_mean(model, names)}"
        )
    return model in names


def elastic(
    model: str, adapter: str, revision: str | None = None
) -> tuple[PixelDiTPipeline, Handle]:
    """The pipeline of a command, made elastic.

    Args:
        model: as in `pipeline`.
        adapter, revision: as in `adapter_source`.

    Raises:
        ValueError: as in `pipeline`, or an adapter that does not fit.
        OSError: a folder that holds no pipeline or adapter.
    """
    from ditdial.elastify import elastify
    from ditdial.plan.execution import Execution

    source = adapter_source(model, adapter, revision)
    pipe, execution = pipeline(model), Execution(merge=True)
    return pipe, elastify(pipe, source, execution=execution, revision=revision)


def adapter_source(model: str, adapter: str, revision: str | None = None) -> Path | str:
    """The folder of an adapter, or its hub id.

    Args:
        model: as in `pipeline`.
        adapter: ``lora``, ``shared`` or a method's name of a reference model; else a folder
            (``./lora`` is always one); else a hub id.
        revision: of the hub id.

    Raises:
        ValueError: none of the three, a revision of a folder, or no such model.
    """
    from ditdial.reference import reference_adapter

    shipped = is_shipped(model, adapter)
    here = shipped or Path(adapter).expanduser().is_dir()
    if here and revision is not None:
        raise ValueError(
            f"revision = {revision!r} of adapter {adapter!r}, which is a folder here; legal: of an "
            "adapter of the hub"
        )
    if not here and "/" in adapter:
        return adapter
    if not here and not _is_reference(model):
        raise FileNotFoundError(
            f"adapter {adapter!r} is neither a folder nor a hub id (owner/name)"
        )
    return Path(adapter).expanduser() if here and not shipped else reference_adapter(adapter, model)


def is_shipped(model: str, adapter: str) -> bool:
    """Whether an adapter is one of the package's own; its folder is nobody's to write into.

    Args:
        model, adapter: as in `adapter_source`.
    """
    from ditdial.reference import reference_adapters

    return _is_reference(model) and adapter in reference_adapters(model)


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
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _refusal(PermissionError, errno.EACCES, path)
    return path


def _refusal(kind: type[OSError], number: int, path: Path) -> OSError:
    return kind(number, os.strerror(number), str(path))
