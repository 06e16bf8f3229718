"""Configs of diffusers models as they lie in folders, checked before a model is built of one.

diffusers builds what a config says: of a number of layers that a slip of a finger has made, as many
modules as memory holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ditdial.plain import json_files
from ditdial.plain.checks import require

CONFIG, INDEX = "config.json", "model_index.json"

MOST = {
    # The largest models of diffusers have 60 layers of a kind; on the meta device one takes 5 ms.
    re.compile("layers|blocks|depth"): 500,
    # Schedulers keep tables of as many numbers; all that are known of have 1000.
    re.compile("timesteps"): 100_000,
}
"""What a number may be at most, by what its name says it counts."""


def read_config(path: Path) -> dict[str, Any]:
    """The config of a model, a scheduler or a pipeline.

    Raises:
        OSError: the file cannot be read.
        ValueError: no JSON object, or a number above what is known of any model; the message names
            the file.
    """
    return json_files.read(path, "config", check_config)


def check_config(config: Any) -> dict[str, Any]:
    """Refuse what is no config, or asks for more of something than any known model has.

    Raises:
        ValueError: naming the entry and what is legal.
    """
    require(isinstance(config, dict), "config", config, "a JSON object")
    for name, value in config.items():
        most = next((most for words, most in MOST.items() if words.search(name)), None)
        if most is not None:
            large = [number for number in _numbers(value) if number > most]
            require(not large, name, value, f"at most {most}")
    return config


def check_folder(folder: Path) -> None:
    """Refuse a pipeline's folder whose configs are none.

    Raises:
        OSError: no pipeline is there, or a file cannot be read.
        ValueError: a config as `check_config` refuses it.
    """
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {INDEX} of a pipeline")
    for path in sorted({folder / INDEX, *folder.glob("*/*config.json")}):
        read_config(path)


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value and in its lists."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(each)
