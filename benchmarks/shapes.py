"""Published classes at their published sizes, and a call with random inputs for each."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from ditdial.published.models import MODELS, Published

KNOWN = MODELS


def build(known: Published, device: str) -> Any:
    """The model with random weights, always the same; in bfloat16 on a GPU."""
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(diffusers, known.model_class)(**known.config).eval()
    return model.to(torch.bfloat16) if device == "cuda" else model


def inputs(known: Published, model: Any, batch: int, device: str) -> dict[str, Any]:
    """A call at the size of ``known``, with random latents and text."""
    (frames, height, width), text = known.grid, known.text_tokens
    config, dtype = model.config, model.dtype

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def image(*frame: int) -> torch.Tensor:
        return random(batch, config.in_channels, *frame, 2 * height, 2 * width)

    times = torch.full((batch,), 500.0, device=device)
    if known.model_class == "DiTTransformer2DModel":
        labels = torch.arange(batch, device=device)
        return {"hidden_states": image(), "timestep": times, "class_labels": labels}
    if known.model_class == "FluxTransformer2DModel":
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        ids = torch.cat([torch.zeros(len(places), 1), places], dim=1)
        return {
            "hidden_states": random(batch, height * width, config.in_channels),
            "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
            "pooled_projections": random(batch, config.pooled_projection_dim),
            "timestep": times / 1000,
            "img_ids": ids.to(device),
            "txt_ids": torch.zeros(text, 3, device=device),
            "guidance": torch.full((batch,), 3.5, device=device),
        }
    if known.model_class == "SD3Transformer2DModel":
        return {
            "hidden_states": image(),
            "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
            "pooled_projections": random(batch, config.pooled_projection_dim),
            "timestep": times,
        }
    text_width = config.text_dim if "text_dim" in config else config.caption_channels
    call = {"encoder_hidden_states": random(batch, text, text_width), "timestep": times}
    if known.model_class == "PixArtTransformer2DModel":
        return call | {"hidden_states": image(), "added_cond_kwargs": {}}
    return call | {"hidden_states": image(frames)}
