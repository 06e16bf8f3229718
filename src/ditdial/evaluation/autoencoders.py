"""Latents to pixels and back, outside a pipeline, of the autoencoders whose latents we know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMAGES = ("AutoencoderKL",)
"""Of single pictures; latents are ``(z - shift) * scale``."""

VIDEOS = ("AutoencoderKLWan", "AutoencoderKLQwenImage")
"""Of frames in a row; latents are ``(z - mean) / std`` by channel."""


def knows(vae: Any) -> bool:
    """Whether an autoencoder (or none) is one of those above."""
    return type(vae).__name__ in IMAGES + VIDEOS


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Latents as a pipeline's model is given them -> pixels in [-1, 1].

    Args:
        latents: ``(B, C, h, w)`` or ``(B, C, T, h, w)``.

    Returns:
        ``(B, 3, H, W)`` or ``(B, 3, frames, H, W)``.
    """
    shift, scale = _statistics(vae, latents)
    z = (latents / scale + shift).to(vae.dtype)
    return _by_picture(vae, z, lambda x: vae.decode(x, return_dict=False)[0]).clamp(-1, 1)


def encoded(vae: Any, pixels: Tensor) -> Tensor:
    """The inverse of `decoded`, as far as there is one: the mean of what pixels are encoded to."""
    z = _by_picture(vae, pixels.to(vae.dtype), lambda x: vae.encode(x).latent_dist.mode())
    shift, scale = _statistics(vae, z)
    return (z - shift) * scale


def _statistics(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """What latents are shifted by, and multiplied with then."""
    facts = vae.config
    if type(vae).__name__ in IMAGES:
        return facts.get("shift_factor") or 0.0, facts.scaling_factor
    mean, std = (
        torch.tensor(each).to(like).view(1, -1, 1, 1, 1)
        for each in (facts.latents_mean, facts.latents_std)
    )
    return mean, 1 / std


def _by_picture(vae: Any, x: Tensor, function: Any) -> Tensor:
    """A function of the autoencoder, frame by frame where it knows single pictures."""
    if type(vae).__name__ in VIDEOS or x.ndim == 4:
        return function(x)
    frames = x.shape[2]
    return function(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)
