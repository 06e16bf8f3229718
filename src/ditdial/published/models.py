"""Published models as data: what they cost is known without their weights.

A model is built from its config on the meta device, where it takes no memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from ditdial.backbones import BACKBONES
from ditdial.checks import did_you_mean
from ditdial.cost.shape import SHAPES, TransformerShape
from ditdial.ops.patching import Triple


@dataclass(frozen=True)
class Published:
    """A model at one size.

    Args:
        grid: base tokens ``(frames, height, width)``.
        text_tokens: of one prompt, as its pipeline pads it.
    """

    model_class: str
    config: dict[str, Any]
    grid: Triple
    text_tokens: int

    def model(self) -> Any:
        """The model, without memory for its weights."""
        with torch.device("meta"):
            return getattr(diffusers, self.model_class)(**self.config)

    def shape(self) -> TransformerShape:
        """What its cost depends on."""
        return BACKBONES[self.model_class]().shape(self.model(), self.grid, self.text_tokens)


PIXART = {"caption_channels": 4096, "use_additional_conditions": False}
SD3 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
WAN_SMALL = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
LATTE = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 64,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "caption_channels": 4096,
}

MODELS: dict[str, Published] = {
    "pixart-alpha-256": Published(
        "PixArtTransformer2DModel", {**PIXART, "sample_size": 32}, (1, 16, 16), 120
    ),
    "pixart-sigma-1024": Published("PixArtTransformer2DModel", PIXART, (1, 64, 64), 300),
    "sd3-medium-1024": Published("SD3Transformer2DModel", SD3, (1, 64, 64), 333),
    "flux-1-dev-1024": Published(
        "FluxTransformer2DModel", {"guidance_embeds": True}, (1, 64, 64), 512
    ),
    "wan-2.1-1.3b-480p": Published("WanTransformer3DModel", WAN_SMALL, (21, 30, 52), 512),
    "wan-2.1-14b-720p": Published("WanTransformer3DModel", {}, (21, 45, 80), 512),
    "qwen-image-1024": Published("QwenImageTransformer2DModel", {}, (1, 64, 64), 512),
    "z-image-1024": Published("ZImageTransformer2DModel", {}, (1, 64, 64), 512),
    "hunyuan-video-720p": Published("HunyuanVideoTransformer3DModel", {}, (33, 45, 80), 256),
    "latte-1-512": Published("LatteTransformer3DModel", LATTE, (16, 32, 32), 120),
}


def published_names() -> list[str]:
    """Names that `published_shape` knows."""
    return [*SHAPES, *MODELS]


@functools.cache
def published_shape(name: str) -> TransformerShape:
    """A published model's shape.

    Raises:
        ValueError: unknown name; the known ones are listed.
    """
    if name in SHAPES:
        return SHAPES[name]
    if name not in MODELS:
        names = published_names()
        raise ValueError(
            f"unknown model {name!r}; legal: {', '.join(names)}{did_you_mean(name, names)}"
        )
    return MODELS[name].shape()
