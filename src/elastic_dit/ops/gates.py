"""Gates that open or close, with a gradient: DyDiT (2410.03456), section 3.

A router gives one logit per head, group of channels or token. In training the gate is open with
probability ``sigmoid(logit)``, whatever the temperature, which only scales the gradient that passes
straight through. Without noise it is open where the logit is above zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

TEMPERATURE = 5.0
"""Of the surrogate gradient, constant in the paper's code."""


def logistic_noise(like: Tensor) -> Tensor:
    """The difference of two Gumbel variables, one for each logit."""
    u = torch.rand_like(like, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
    return torch.logit(u)


def gate(logits: Tensor, noise: Tensor | None = None, temperature: float = TEMPERATURE) -> Tensor:
    """1 where a gate is open and 0 elsewhere, with the gradient of a sigmoid.

    Args:
        noise: added to the logits, as `logistic_noise` draws it; None opens what is above zero.
        temperature: divides the logits in the sigmoid that gives the gradient.
    """
    logits = logits.float() if noise is None else logits.float() + noise
    soft = torch.sigmoid(logits / temperature)
    return (logits > 0).float() + (soft - soft.detach())  # exactly 0 or 1


def with_constant(gates: Tensor) -> Tensor:
    """Gates ``(B, n - 1)`` with a first one that is always open, ``(B, n)``."""
    return torch.cat([torch.ones_like(gates[:, :1]), gates], dim=1)


def fixed_count(logits: Tensor, share: float, multiple: int = 1) -> Tensor:
    """Places ``(B, k)`` of the highest of N logits per row, in rising order.

    Args:
        logits: ``(B, N)``.
        share: of the N that ``k`` is, rounded up to a multiple; at most N.
    """
    return logits.topk(kept_tokens(logits.shape[1], share, multiple), dim=1).indices.sort(1).values


def kept_tokens(tokens: int, share: float, multiple: int = 1) -> int:
    """How many tokens a share of them is: at least one, rounded up to a multiple, at most all."""
    count = max(1, round(tokens * share))
    return min(tokens, count + -count % multiple)
