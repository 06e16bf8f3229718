"""What is known of a model class, and what a coarse mode of it would cost; no weights needed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ditdial.backbones import BACKBONES, Backbone, nearest
from ditdial.host.configs import read_config
from ditdial.ops.patching import Triple
from ditdial.plain.checks import did_you_mean
from ditdial.plan.mode import FULL, Mode
from ditdial.published.models import MODELS

SCALES = (2, 4)
AXES = {"t": "time", "h": "height", "w": "width"}


def probe(target: str) -> dict[str, Any]:
    """Look at a diffusers class, a published model or a folder.

    Args:
        target: name of a diffusers model class, name of a published model, or folder of a model or
            a pipeline.

    Returns:
        ``class``, ``supported``, the parts of the contract found, and for a supported class the
        cost of each mode at ``grid``. A class that is not supported lists what was found and what
        is missing.

    Raises:
        ValueError: neither of the three, a class that is no diffusers model, or a config that no
            model can be built of.
        FileNotFoundError: a folder without a model's config.
    """
    name, config, grid, text = _resolve(target)
    try:
        return _looked_at(name, config, grid, text)
    except Exception as error:  # diffusers checks little of what it is given, and raises anything
        raise ValueError(f"no {name} can be built of the config of {target!r}: {error}") from error


def _looked_at(
    name: str, config: dict[str, Any] | None, grid: Triple | None, text: int | None
) -> dict[str, Any]:
    model = _on_meta(name, config)
    if name in BACKBONES:
        return {"class": name, "supported": True, **_facts(BACKBONES[name](), model, grid, text)}
    found, missing = _seams(model) if model is not None else ({}, list(SEAMS))
    return {
        "class": name,
        "supported": False,
        "found": found,
        "missing": missing,
        "nearest": nearest(name),
    }


def _facts(backbone: Backbone, model: Any, grid: Triple | None, text: int | None) -> dict[str, Any]:
    guidance = {
        True: "one batch, conditional rows first",
        False: "one batch, conditional rows last",
        None: "one call per branch",
    }
    facts: dict[str, Any] = {
        "tokens from": backbone.patches.embed,
        "positions from": backbone.rotary
        or ", ".join(dict(backbone.rewired))
        or "the module that makes tokens, or the arguments",
        "tokens into latents": backbone.patches.output,
        "coarse along": [AXES[axis] for axis in backbone.axes],
        "guidance": guidance[backbone.arguments.conditional_first],
        "packed guidance": backbone.packed is not None,
    }
    if model is None:
        return facts | {"cost": None, "why": "this class has no default config to count with"}
    usual_grid, usual_text = backbone.default_size(model)
    grid, text = grid or usual_grid, usual_text if text is None else text
    shape = backbone.shape(model, grid, text)
    scales: list[Any] = [*SCALES, (2, 1, 1)] if "t" in backbone.axes and grid[0] > 1 else [*SCALES]
    why = backbone.sizes.why_one(model)
    facts["low band"] = why or "runs without an adapter"
    modes = [FULL, *(Mode(scale) for scale in scales), *[Mode(low_band=2)] * (not why)]
    cost = [
        {
            "mode": mode.name,
            "tokens": shape.tokens(mode),
            "macs": shape.macs(mode),
            "ratio": shape.macs(mode) / shape.macs(FULL),
        }
        for mode in modes
    ]
    layers = sum(1 for _ in backbone.low_rank_layers(model))
    return facts | {"low-rank layers": layers, "grid": grid, "text tokens": text, "cost": cost}


def _resolve(target: str) -> tuple[str, dict[str, Any] | None, Triple | None, int | None]:
    if target in MODELS:
        known = MODELS[target]
        return known.model_class, known.config, known.grid, known.text_tokens
    folder = Path(target).expanduser()
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            folder = folder / "transformer"
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{str(folder)!r} has no config.json of a model")
        config = read_config(folder / "config.json")
        name = config.get("_class_name")
        if not _is_model(name):
            near = did_you_mean(name, BACKBONES)
            raise ValueError(
                f"{str(folder / 'config.json')!r}: _class_name = {name!r}; legal: a diffusers "
                f"model class{near}"
            )
        return str(name), {k: v for k, v in config.items() if not k.startswith("_")}, None, None
    if not _is_model(target):
        raise ValueError(
            f"{target!r} is no diffusers model class, folder or published model; "
            f"legal classes: {', '.join(BACKBONES)}; legal models: {', '.join(MODELS)}"
            f"{did_you_mean(target, [*BACKBONES, *MODELS])}"
        )
    return target, None, None, None


def _is_model(name: object) -> bool:
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    return inspect.isclass(cls) and issubclass(cls, nn.Module)


def _on_meta(name: str, config: dict[str, Any] | None) -> Any:
    """The model without memory, or None if the class needs arguments that nobody gave."""
    with torch.device("meta"):
        try:
            return getattr(diffusers, name)(**(config or {}))
        except (TypeError, ValueError, AttributeError):
            if config is not None:
                raise
            return None


SEAMS = {
    "module that makes tokens": ("x_embedder", "patch_embed", "pos_embed", "img_in", "proj_in"),
    "module that ends tokens": ("proj_out", "final_layer", "proj_out_2"),
    "positions": ("rope", "pos_embed", "rotary", "time_pos"),
    "blocks": ("blocks", "layers"),
}


def _seams(model: Any) -> tuple[dict[str, list[str]], list[str]]:
    """Children of a model by the part of the contract that their names suggest."""
    names = [name for name, _ in model.named_children()]
    found = {
        part: [name for name in names if any(word in name for word in words)]
        for part, words in SEAMS.items()
    }
    missing = [part for part, where in found.items() if not where]
    return {part: where for part, where in found.items() if where}, missing
