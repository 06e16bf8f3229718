"""Rectified-flow path and its variance-preserving preconditioning, for data of unit variance.

The path is ``x = (1 - s) x0 + s e`` with noise level ``s`` in [0, 1] and velocity ``v = e - x0``.
The network does not predict ``v`` directly. With ``n = sqrt((1-s)^2 + s^2)`` its input is ``x / n``
and its target

    f = ((1 - s) e - s x0) / n

which has unit variance at every noise level and is uncorrelated with the input (the
``v``-prediction of Salimans and Ho, 2202.00512, written on the rectified-flow path). Then ``v =
((2s - 1) x / n + f) / n``. A variance-preserving scheduler with ``prediction_type="v_prediction"``
uses the network as it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def path_norm(level: Tensor) -> Tensor:
    """``n = sqrt((1-s)^2 + s^2)``, same shape as ``level``."""
    return torch.sqrt((1 - level) ** 2 + level**2)


def network_input_and_target(data: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """The pair the network is trained on; ``level`` broadcasts against ``data``."""
    norm = path_norm(level)
    return ((1 - level) * data + level * noise) / norm, ((1 - level) * noise - level * data) / norm


def velocity(
    network_input: Tensor, prediction: Tensor, level: Tensor, norm: Tensor | None = None
) -> Tensor:
    """Velocity of the flow from the network's unit-variance input and prediction.

    Args:
        norm: `path_norm` of the level, where it is known.
    """
    norm = path_norm(level) if norm is None else norm
    return ((2 * level - 1) * network_input + prediction) / norm


def stratified_levels(
    count: int,
    generator: torch.Generator,
    *,
    mean: float,
    std: float,
    within: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Noise levels ``sigmoid(mean + std z)``, one from each of ``count`` equally likely strata.

    Args:
        within: the shares of the distribution that they lie between.
    """
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    if within != (0.0, 1.0):
        uniform = torch.lerp(torch.tensor(within[0]), torch.tensor(within[1]), uniform)
    normal = torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6))
    level = torch.sigmoid(mean + std * normal).float()
    return level[torch.randperm(count, generator=generator)]


def level_share(level: float, *, mean: float, std: float) -> float:
    """The share of such noise levels that lie below one."""
    if level <= 0 or level >= 1:
        return float(level > 0)
    normal = (math.log(level) - math.log1p(-level) - mean) / std
    return 0.5 * math.erfc(-normal / math.sqrt(2))


def level_quantile(share: float, *, mean: float, std: float) -> float:
    """The noise level below which a share of such levels lies; the inverse of `level_share`."""
    uniform = torch.tensor(share, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform)).item()


def min_snr_weight(level: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights (Hang et al., 2303.09556) of the target ``f``.

    Weights ``min(SNR, gamma) / SNR`` of a predicted noise's error are ``min(SNR, gamma) / (SNR +
    1)`` of that of ``f``, with the path's ``SNR = ((1 - s) / s)^2``.
    """
    clean, noise = (1 - level).square(), level.square()
    return torch.minimum(clean, gamma * noise) / (clean + noise)
