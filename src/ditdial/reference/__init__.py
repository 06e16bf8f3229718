"""The small models that ship with the package: base, adapters, classifier, reference statistics.

Each has a folder with a card (``README.md``) that states data, commands, commit and metrics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ditdial.evaluation.runner import Judge
from ditdial.plain import json_files
from ditdial.plain.checks import did_you_mean
from ditdial.sampling.pixel_pipeline import PixelDiTPipeline

HERE = Path(__file__).parent


def reference_names() -> list[str]:
    """Reference models of this installation."""
    return sorted(path.parent.name for path in HERE.glob("*/pipeline"))


def reference_folder(name: str = "mnist") -> Path:
    """Folder of a reference model.

    Raises:
        ValueError: no such model; those at hand are named.
    """
    if name not in reference_names():
        names = reference_names()
        near = did_you_mean(name, names)
        raise ValueError(f"reference model {name!r}; legal: {', '.join(names)}{near}")
    return HERE / name


def load_reference(name: str = "mnist") -> PixelDiTPipeline:
    """The stock base model in its pipeline, float32."""
    folder = reference_folder(name) / "pipeline"
    return PixelDiTPipeline.from_pretrained(folder, dtype=torch.float32)


def reference_adapters(name: str = "mnist") -> dict[str, Path]:
    """Folders of the adapters of a reference model, by the name that `reference_adapter` takes.

    Raises:
        ValueError: no such model; those at hand are named.
    """
    return {
        path.parent.name.removeprefix("flexidit-"): path.parent
        for path in reference_folder(name).glob("*/adapter.safetensors")
    }


def reference_adapter(recipe: str = "lora", name: str = "mnist") -> Path:
    """Folder of an adapter of a reference model.

    Args:
        recipe: ``lora`` or ``shared`` for FlexiDiT's, otherwise the method's name.

    Raises:
        ValueError: no such adapter; those at hand are named.
    """
    folders = reference_adapters(name)
    if recipe not in folders:
        raise ValueError(
            f"adapter {recipe!r} of reference model {name!r}; legal: {', '.join(sorted(folders))}"
            f"{did_you_mean(recipe, folders)}"
        )
    return folders[recipe]


def reference_judge(name: str = "mnist") -> Judge:
    """Metrics against the reference model's held-out data, in its classifier's features."""
    folder = reference_folder(name)
    return Judge.load(str(folder / "classifier"), folder / "real.safetensors")


def reference_settings(name: str = "mnist") -> dict[str, Any]:
    """Tuned guidance scales and the schedules of the demo."""
    return json_files.read(reference_folder(name) / "settings.json", "settings", dict)
