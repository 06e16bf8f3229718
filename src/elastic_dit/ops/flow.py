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

import torch
from torch import Tensor


def path_norm(level: Tensor) -> Tensor:
    """``n = sqrt((1-s)^2 + s^2)``, same shape as ``level``."""
    return torch.sqrt((1 - level) ** 2 + level**2)


def network_input_and_target(data: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """The pair the network is trained on; ``level`` broadcasts against ``data``."""
    norm = path_norm(level)
    return ((1 - level) * data + level * noise) / norm, ((1 - level) * noise - level * data) / norm


def velocity(network_input: Tensor, prediction: Tensor, level: Tensor) -> Tensor:
    """Velocity of the flow from the network's unit-variance input and prediction."""
    return ((2 * level - 1) * network_input + prediction) / path_norm(level)


def stratified_levels(count: int, generator: torch.Generator, *, mean: float, std: float) -> Tensor:
    """Noise levels ``sigmoid(mean + std z)``, one from each of ``count`` equally likely strata."""
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    normal = torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6))
    level = torch.sigmoid(mean + std * normal).float()
    return level[torch.randperm(count, generator=generator)]
