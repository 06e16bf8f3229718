"""What we know of diffusers' model classes; one file each."""

from __future__ import annotations

import difflib

from torch import nn

from elastic_dit.backbones.base import Backbone
from elastic_dit.backbones.dit import DiTBackbone

BACKBONES: dict[str, type[Backbone]] = {"DiTTransformer2DModel": DiTBackbone}
"""Supported diffusers classes by name."""


def backbone_for(model: nn.Module) -> Backbone:
    """The backbone of a model.

    Raises:
        ValueError: its class is not supported; the nearest supported ones are named.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in BACKBONES:
            return BACKBONES[cls.__name__]()
    name = type(model).__name__
    near = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0) or list(BACKBONES)
    raise ValueError(f"model class {name!r} is not supported; legal: {', '.join(near)}")


__all__ = ["BACKBONES", "Backbone", "backbone_for"]
