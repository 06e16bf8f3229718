"""The base that a training starts from: opened only if it is what the recipe trains.

A folder is no proof. A model of another class, one that predicts the noise, or one of other
channels would run for hours on targets that it was never trained for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

from ditdial.plain import json_files
from ditdial.plain.checks import require
from ditdial.training.config import Recipe
from ditdial.training.limits import mapping

VELOCITIES = ("v_prediction", "flow_prediction")
"""What schedulers of diffusers call the predictions of `ditdial.ops.flow`; those whose class is
named ``FlowMatch...`` know no other."""

MOST = {
    "num_layers": 1000,
    "num_attention_heads": 1024,
    "attention_head_dim": 1024,
    "num_embeds_ada_norm": 10**6,
    "sample_size": 1024,
    "patch_size": 4096,
}
"""Of what diffusers makes modules and tables before it looks at any weights."""


def open_base(folder: str, recipe: Recipe, name: str) -> Any:
    """The trained base, in eval mode; seeds what is drawn for it next.

    Args:
        folder: of the model, alone or in a pipeline, whose scheduler then says what is predicted.
        name: what the recipe calls ``folder``.

    Raises:
        FileNotFoundError: no model there.
        ValueError: a damaged model, one of another class, one that predicts no velocities, or one
            of other channels or patches than the data.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{name} = {folder!r} holds no model")
    _check_config(json_files.read(path / "config.json", name, mapping), recipe, folder, name)
    _check_scheduler(path.resolve().parent / "scheduler" / "scheduler_config.json", folder, name)
    torch.manual_seed(recipe.seed)
    return _read(folder, name).eval()


def _check_config(config: dict[str, Any], recipe: Recipe, folder: str, name: str) -> None:
    kind, wanted = config.get("_class_name"), DiTTransformer2DModel.__name__
    require(kind == wanted, name, folder, f"a {wanted}, and it holds a {kind}")
    data, ins = recipe.data, config.get("in_channels", 4)
    legal = f"a base of data.channels = {data.channels} channels, and it has {ins} channels"
    require(ins == data.channels, name, folder, legal)
    outs = config.get("out_channels") or ins
    legal = "a base that predicts velocities, as many channels as it gets; one of "
    require(outs == ins, name, folder, f"{legal}{ins} channels that predicts {outs} does not")
    for key, most in MOST.items():
        size = config.get(key, 1)
        whole = type(size) is int and 1 <= size <= most
        require(whole, name, folder, f"a base whose {key} is in 1..{most}, and its is {size!r}")
    patch = config.get("patch_size", 2)
    legal = f"a base whose patches divide data.image_size = {data.image_size}; its have {patch}"
    require(data.image_size % patch == 0, name, folder, legal)


def _check_scheduler(path: Path, folder: str, name: str) -> None:
    if not path.exists():
        return
    scheduler = json_files.read(path, "a scheduler", mapping)
    predicted, kind = scheduler.get("prediction_type"), str(scheduler.get("_class_name"))
    flows = predicted in VELOCITIES or (predicted is None and kind.startswith("FlowMatch"))
    legal = f"a base that predicts velocities; its {kind} says that it predicts {predicted!r}"
    require(flows, name, folder, legal)


def _read(folder: str, name: str) -> Any:
    try:
        model, info = DiTTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # each damage has an error of its own in diffusers and safetensors
        raise ValueError(f"{name} = {folder!r} cannot be read: {error}") from error
    missing = sorted(info["missing_keys"]) or sorted(info["unexpected_keys"])
    require(not missing, name, folder, f"weights of its own class; {missing[:3]} do not fit it")
    bad = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    require(not bad, name, folder, f"finite weights; {bad[:3]} are not")
    return model
