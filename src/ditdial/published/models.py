"""Published models as data: what they cost is known without their weights.

A model is built from its config on the meta device, where it takes no memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from ditdial.backbones import BACKBONES, backbone_for
from ditdial.cost.shape import TransformerShape
from ditdial.methods.base import Method
from ditdial.ops.patching import Triple
from ditdial.plain.checks import did_you_mean


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

    def shape(self, method: Method | None = None, *, merged: bool = False) -> TransformerShape:
        """What its cost depends on, bare or with a method.

        Args:
            merged: low-rank updates are added to the weights beforehand.
        """
        backbone, size = BACKBONES[self.model_class](), (self.grid, self.text_tokens)
        if method is None:
            return backbone.shape(self.model(), *size)
        return method.shape(self.model(), backbone, size, merged=merged)

    @classmethod
    def of(cls, model: Any) -> Published:
        """A live model at its usual size."""
        config = {name: value for name, value in model.config.items() if not name.startswith("_")}
        grid, text_tokens = backbone_for(model).default_size(model)
        return cls(type(model).__name__, config, grid, text_tokens)


def _dit(width: int, depth: int, heads: int, pixels: int) -> Published:
    """DiT with patches of 2 x 2, for 1000 classes; latents have an eighth of the pixels."""
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": depth,
        "sample_size": pixels // 8,
        "patch_size": 2,
    }
    return Published("DiTTransformer2DModel", config, (1, pixels // 16, pixels // 16), 0)


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
    "dit-s-2-256": _dit(384, 12, 6, 256),
    "dit-b-2-256": _dit(768, 12, 12, 256),
    "dit-l-2-256": _dit(1024, 24, 16, 256),
    "dit-xl-2-256": _dit(1152, 28, 16, 256),
    "dit-xl-2-512": _dit(1152, 28, 16, 512),
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


def published_model(name: str) -> Published:
    """A published model.

    Raises:
        ValueError: unknown name; the known ones are listed.
    """
    if name not in MODELS:
        raise ValueError(
            f"unknown model {name!r}; legal: {', '.join(MODELS)}{did_you_mean(name, MODELS)}"
        )
    return MODELS[name]


@functools.cache
def published_shape(name: str) -> TransformerShape:
    """What the cost of a published model depends on.

    Raises:
        ValueError: unknown name; the known ones are listed.
    """
    return published_model(name).shape()
