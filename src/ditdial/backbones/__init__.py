"""What we know of diffusers' model classes; one file each.

A backbone is knowledge, not code: which submodules make tokens and end them, what the arguments of
a call mean, how noise levels are told, where tokens meet, what its blocks multiply. The contract is
`ditdial.backbones.base`; what is said here of a class is enough to run every method on it that the
class allows.
"""

from __future__ import annotations

import difflib

from torch import nn

from ditdial.backbones.auraflow import AuraFlowBackbone
from ditdial.backbones.base import Backbone
from ditdial.backbones.chroma import ChromaBackbone
from ditdial.backbones.cogvideox import CogVideoXBackbone
from ditdial.backbones.cogview4 import CogView4Backbone
from ditdial.backbones.dit import DiTBackbone
from ditdial.backbones.flux import FluxBackbone
from ditdial.backbones.flux2 import Flux2Backbone
from ditdial.backbones.hunyuan_video import HunyuanVideoBackbone
from ditdial.backbones.latte import LatteBackbone
from ditdial.backbones.ltx import LTXBackbone
from ditdial.backbones.lumina2 import Lumina2Backbone
from ditdial.backbones.pixart import PixArtBackbone
from ditdial.backbones.qwenimage import QwenImageBackbone
from ditdial.backbones.sana import SanaBackbone
from ditdial.backbones.sd3 import SD3Backbone
from ditdial.backbones.wan import WanBackbone
from ditdial.backbones.z_image import ZImageBackbone

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
        f"({len(BACKBONES)} in all: ditdial backbones)"
    )


def nearest(name: str) -> list[str]:
    """Supported classes whose names are most like this one."""
    return difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0)


__all__ = ["BACKBONES", "Backbone", "backbone_for", "nearest"]
