"""What we know of diffusers' model classes; one file each."""

from __future__ import annotations

import difflib

from torch import nn

from elastic_dit.backbones.auraflow import AuraFlowBackbone
from elastic_dit.backbones.base import Backbone
from elastic_dit.backbones.chroma import ChromaBackbone
from elastic_dit.backbones.cogvideox import CogVideoXBackbone
from elastic_dit.backbones.cogview4 import CogView4Backbone
from elastic_dit.backbones.dit import DiTBackbone
from elastic_dit.backbones.flux import FluxBackbone
from elastic_dit.backbones.flux2 import Flux2Backbone
from elastic_dit.backbones.hunyuan_video import HunyuanVideoBackbone
from elastic_dit.backbones.latte import LatteBackbone
from elastic_dit.backbones.ltx import LTXBackbone
from elastic_dit.backbones.lumina2 import Lumina2Backbone
from elastic_dit.backbones.pixart import PixArtBackbone
from elastic_dit.backbones.qwenimage import QwenImageBackbone
from elastic_dit.backbones.sana import SanaBackbone
from elastic_dit.backbones.sd3 import SD3Backbone
from elastic_dit.backbones.wan import WanBackbone
from elastic_dit.backbones.z_image import ZImageBackbone

ALL = (
    AuraFlowBackbone,
    ChromaBackbone,
    CogVideoXBackbone,
    CogView4Backbone,
    DiTBackbone,
    FluxBackbone,
    Flux2Backbone,
    HunyuanVideoBackbone,
    LatteBackbone,
    LTXBackbone,
    Lumina2Backbone,
    PixArtBackbone,
    QwenImageBackbone,
    SanaBackbone,
    SD3Backbone,
    WanBackbone,
    ZImageBackbone,
)

BACKBONES: dict[str, type[Backbone]] = {backbone.model_class: backbone for backbone in ALL}
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
    raise ValueError(
        f"model class {name!r} is not supported; legal: {', '.join(nearest(name))} "
        f"({len(BACKBONES)} in all: elastic-dit backbones)"
    )


def nearest(name: str) -> list[str]:
    """Supported classes whose names are most like this one."""
    return difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0)


__all__ = ["BACKBONES", "Backbone", "backbone_for", "nearest"]
