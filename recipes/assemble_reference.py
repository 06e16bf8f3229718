"""Put finished training runs into the package as its reference model.

    python recipes/assemble_reference.py mnist --runs runs --data <folder or hub id>

Takes <runs>/<name>-base, and as far as they are there -classifier, -flexidit-lora,
-flexidit-shared, -ddit, -ppflow, -dydit and -sparsedit (and the -start of those that were trained
in two parts), writes src/ditdial/reference/<name>/ in half precision, and measures the held-out set
once. A base without a classifier of its own (mnist-two-sizes) is judged by another reference's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

from ditdial.adapter import Adapter
from ditdial.evaluation.features import load_features
from ditdial.evaluation.runner import save_reference_set
from ditdial.measure.provenance import provenance
from ditdial.reference import HERE
from ditdial.sampling.pixel_pipeline import PixelDiTPipeline
from ditdial.training.config import DataConfig
from ditdial.training.data import ImageData


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--data", required=True)
    arguments = parser.parse_args()
    runs, name = arguments.runs, arguments.name
    target = HERE / name
    target.mkdir(exist_ok=True)
    facts = {}

    base = runs / f"{name}-base" / "export"
    card = json.loads((base / "training.json").read_text())
    model = DiTTransformer2DModel.from_pretrained(base).half()
    statistics = {"data_mean": card["data_mean"], "data_std": card["data_std"]}
    pipe = PixelDiTPipeline(model, FlowMatchEulerDiscreteScheduler(), **statistics)
    pipe.save_pretrained(target / "pipeline")
    facts["base"] = _facts(card)

    classifier = runs / f"{name}-classifier" / "export"
    if classifier.is_dir():
        facts["classifier"] = _add_classifier(classifier, target, arguments.data)

    for method in ("flexidit-lora", "flexidit-shared", "ddit", "ppflow", "dydit", "sparsedit"):
        export = runs / f"{name}-{method}" / "export"
        start = runs / f"{name}-{method}-start" / "export"
        if start.is_dir():  # trained in two parts
            facts[f"{method}-start"] = _facts(Adapter.from_pretrained(start).notes["training"])
        if export.is_dir():
            adapter = Adapter.from_pretrained(export)
            facts[method] = _facts(adapter.notes.pop("training"))
            adapter.save_pretrained(target / method, dtype=torch.float16)

    source = {key: value for key, value in provenance().items() if key not in ("command", "date")}
    (target / "training.json").write_text(
        json.dumps({"runs": facts, "machine": source}, indent=2) + "\n"
    )


def _add_classifier(export: Path, target: Path, path: str) -> dict:
    """Copy it, and measure the held-out set in its features."""
    shutil.copytree(export, target / "classifier", dirs_exist_ok=True)
    card = json.loads((target / "classifier" / "training.json").read_text())
    (target / "classifier" / "training.json").unlink()
    data = card["recipe"]["data"] | {"path": path, "split": "test"}
    held_out = ImageData(DataConfig(**data))
    network, _ = load_features(str(target / "classifier"))
    save_reference_set(network, held_out.images.float() / 255, target / "real.safetensors")
    return _facts(card)


def _facts(card: dict) -> dict:
    """What a card needs: everything but where the data lay on the training machine."""
    card = json.loads(json.dumps(card))
    card["recipe"]["data"].pop("path")
    return card


if __name__ == "__main__":
    main()
