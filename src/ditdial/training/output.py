"""The output folder of a run: who may write into it, and the record of what runs there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ditdial.plain import files, json_files
from ditdial.training.config import Recipe
from ditdial.training.limits import mapping
from ditdial.training.lock import check_unlocked, locked

RECORD, CHECKPOINTS, LOG, EXPORT = "recipe.json", "checkpoints", "log.jsonl", "export"


@contextlib.contextmanager
def claimed(recipe: Recipe, *, resume: bool) -> Iterator[None]:
    """Hold a run's output folder, with its record in place.

    Raises:
        BlockingIOError: another run holds it.
        FileExistsError, ValueError: as from `check_output`.
        OSError: the folder cannot be made or written into.
    """
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        _check_record(recipe, resume=resume)
        (output / CHECKPOINTS).mkdir(exist_ok=True)
        if not (output / RECORD).exists():
            files.write(output / RECORD, recipe.to_json())
        yield


def check_output(recipe: Recipe, *, resume: bool) -> None:
    """Refuse an output folder that holds another run, or a run that is not to be resumed.

    Raises:
        BlockingIOError: a run is at work in it.
        FileExistsError: it holds a run and ``resume`` is off.
        OSError: something else is in the place of a file or folder that will be written.
        ValueError: it holds the run of another recipe, or of one that is not known any more.
    """
    check_unlocked(Path(recipe.output))
    _check_record(recipe, resume=resume)


def _check_record(recipe: Recipe, *, resume: bool) -> None:
    output = Path(recipe.output)
    record, held = output / RECORD, _held(output)
    if not held:
        return
    if not resume:
        raise FileExistsError(
            f"{str(output)!r} holds a run already; resume it, or name another output"
        )
    _check_kinds(output, held)
    if RECORD not in held:
        raise ValueError(
            f"{str(output)!r} holds {', '.join(held)} and no {RECORD}, so that nothing says which "
            "recipe they are of; put it back, or name another output"
        )
    if json_files.read(record, "the record of a run", mapping) != json.loads(recipe.to_json()):
        raise ValueError(
            f"{str(output)!r} was started with another recipe; resuming needs the same one"
        )


def _check_kinds(output: Path, held: list[str]) -> None:
    """Refuse what cannot be read or written as a run does it, pipes and broken links included."""
    for name in held:
        path = output / name
        if name in (CHECKPOINTS, EXPORT) and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        if name in (RECORD, LOG) and not path.is_file():
            raise FileExistsError(errno.EEXIST, "is no file", str(path))


def _held(output: Path) -> list[str]:
    """What a run has left in a folder; an empty folder of checkpoints is nothing yet."""
    names = [name for name in (RECORD, LOG, EXPORT) if os.path.lexists(output / name)]
    checkpoints = output / CHECKPOINTS
    empty = checkpoints.is_dir() and not any(checkpoints.iterdir())
    return names + [CHECKPOINTS] * (os.path.lexists(checkpoints) and not empty)
