"""What reads files that a user may have changed, each with a good file to start from."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import strategies as st
from tests.fuzz import mutations
from tests.wild.bounded import command

from ditdial import Adapter, Schedule, elastify
from ditdial.adapter import CALIBRATION, CONFIG, WEIGHTS
from ditdial.cli.arguments import pipeline
from ditdial.handle import Handle
from ditdial.reference import reference_folder
from ditdial.training.config import load_recipe
from ditdial.training.tasks import build_task

SCHEDULER = FlowMatchEulerDiscreteScheduler()

RECIPE: dict[str, Any] = {
    "task": "base",
    "output": "run",
    "seed": 0,
    "data": {"path": "pictures", "image_size": 16, "channels": 1, "mean": 0.1, "std": 0.3},
    "optim": {"name": "adamw", "lr": 1e-3, "warmup_steps": 2, "schedule": "cosine"},
    "loop": {"images": 8, "batch_size": 4, "checkpoint_every": 5},
    "base": {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "patch_size": 8}
    | {"num_classes": 2},
}

REPORT: dict[str, Any] = {
    "macs": 3e9,
    "ratio": 0.6,
    "seconds": 0.2,
    "budget": 0.7,
    "calls": [
        {"index": 0, "level": 1.0, "branch": None, "mode": "patch2", "guide": "full", "rows": 4}
        | {"macs": 1e9, "seconds": 0.1, "pictures": None, "why": [None]},
        {"index": 1, "level": 0.5, "branch": "cond", "mode": None, "guide": None, "rows": 2}
        | {"macs": 2e9, "seconds": 0.1, "pictures": [0], "why": [{"score": 0.1}]},
    ],
}

RESULTS: dict[str, Any] = {
    "provenance": {"command": "ditdial eval"},
    "rows": [
        {"name": "full", "gmacs": 1.5, "ratio": 1.0, "seconds": 3.0, "frechet": 1.25}
        | {"frechet_noise": 0.1, "frechet_sets": [1.2, 1.3], "accuracy": 0.99, "odd": "x"},
        {"name": "weak", "gmacs": 0.5, "ratio": None, "psnr": 20.0, "psnr_noise": None},
    ],
}


@dataclass(frozen=True)
class Reader:
    """Something that reads a file.

    Args:
        contents: of the file.
        use: is given a folder and a content, puts the file there and reads it; commands return what
            `tests.wild.bounded.command` does.
        words: of which an error has one: names of the file and of its entries.
        inputs: how many a long run tries.
    """

    contents: st.SearchStrategy[bytes]
    use: Callable[[Path, bytes], Any]
    words: frozenset[str]
    inputs: int


def keys_of(data: Any) -> set[str]:
    """The names of all entries in plain data."""
    if isinstance(data, list):
        return set().union(*map(keys_of, data))
    return set().union(data, *map(keys_of, data.values())) if isinstance(data, dict) else set()


def readers(
    model: Any, other: Handle, adapter: Adapter, bare: Mapping[str, Adapter]
) -> dict[str, Reader]:
    """By name.

    Args:
        model: a stock one, which the adapters fit.
        other: of another model with such an adapter.
        adapter: with a calibration.
        bare: adapters without one, of every method.
    """
    calibration, schedule = adapter.calibration, Schedule.weak_first(0.4, guide_fraction=0.6)
    assert calibration is not None

    def elastic(adapter: Adapter, changed: str) -> Callable[[Path, bytes], None]:
        def use(folder: Path, content: bytes) -> None:
            saved = adapter.save_pretrained(folder / "adapter")
            (saved / changed).write_bytes(content)
            handle = elastify(model, saved)
            try:
                handle.budget = 0.9
                handle.plan(4, scheduler=SCHEDULER)
            finally:
                handle.remove()

        return use

    def plan(folder: Path, content: bytes) -> None:
        (folder / "schedule.json").write_bytes(content)
        read = Schedule.load(folder / "schedule.json")
        str(read)
        other.schedule = read
        other.plan(4, scheduler=SCHEDULER)

    def recipe(folder: Path, content: bytes) -> None:
        (folder / "recipe.toml").write_bytes(content)
        build_task(load_recipe(folder / "recipe.toml"))

    def report(folder: Path, content: bytes) -> Any:
        (folder / "r.json").write_bytes(content)
        told = command("report", "r.json", "--json")
        shown = command("report", "r.json")
        assert told["code"] == shown["code"], (told, shown)
        return shown

    def probe(folder: Path, content: bytes) -> Any:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_bytes(content)
        return command("probe", "model")

    def load(name: str) -> Callable[[Path, bytes], None]:
        def use(folder: Path, content: bytes) -> None:
            shutil.copytree(reference_folder() / "pipeline", folder / "pipe")
            (folder / "pipe" / name).write_bytes(content)
            pipeline("pipe")

        return use

    def made(kind: Any, use: Any, data: Any, name: str, count: int, *more: str) -> Reader:
        return Reader(kind(data), use, frozenset({name, *more, *keys_of(data)}), count)

    json_files = mutations.json_files
    tiny = {name: value for name, value in model.config.items() if name != "_name_or_path"}
    found = {
        "calibration": made(
            json_files, elastic(adapter, CALIBRATION), calibration.to_dict(), CALIBRATION, 1000
        ),
        # What its modes do not fit is the handle's setting of that name.
        "schedule": made(
            json_files, plan, schedule.to_dict(), "schedule.json", 1800, "schedule asks for"
        ),
        "recipe": made(mutations.toml_files, recipe, RECIPE, "recipe.toml", 1400),
        "report": made(json_files, report, REPORT, "r.json", 500),
        "results": made(json_files, report, RESULTS, "r.json", 500),
        "model": made(
            json_files, probe, {"_class_name": "DiTTransformer2DModel", **tiny}, "model", 500
        ),
    }
    for name, each in bare.items():
        config, content = (file_of(each, file) for file in (CONFIG, WEIGHTS))
        found[f"config of {name}"] = made(
            json_files, elastic(each, CONFIG), json.loads(config), CONFIG, 200
        )
        found[f"weights of {name}"] = Reader(
            mutations.safetensors(content),
            elastic(each, WEIGHTS),
            frozenset({WEIGHTS, "weights", "budget", "holds"}),
            200,
        )
    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        data = json.loads((reference_folder() / "pipeline" / name).read_text())
        found[name] = made(json_files, load(name), data, "pipe", 100)
    return found


def file_of(adapter: Adapter, name: str) -> bytes:
    """The content of one of the files of a saved adapter."""
    with tempfile.TemporaryDirectory() as folder:
        return (adapter.save_pretrained(Path(folder) / "adapter") / name).read_bytes()
