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

CAPACITY_MULTIPLE = 8
"""A fixed number of tokens is rounded up to a multiple of this, which matrix units like."""


def logistic_noise(like: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """The difference of two Gumbel variables, one for each logit; none without a generator."""
    if generator is None:
        return None
    uniform = torch.rand(like.shape, generator=generator, device=generator.device)
    return torch.logit(uniform.clamp(1e-6, 1 - 1e-6)).to(like.device)


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


def open_tokens(logits: Tensor, share: float | None = None) -> Tensor:
    """Places of open tokens in all rows laid end to end, ``(k,)`` in rising order.

    Args:
        logits: ``(B, N)``.
        share: of each row's tokens that are open, the highest ones, so that k is known beforehand
            (see `kept_tokens`); None opens those above zero.
    """
    if share is None:
        return (logits > 0).flatten().nonzero()[:, 0]
    rows, tokens = logits.shape
    places = logits.topk(kept_tokens(tokens, share), dim=1).indices.sort(dim=1).values
    return (places + tokens * torch.arange(rows, device=logits.device)[:, None]).flatten()


def open_mask(logits: Tensor, share: float | None = None) -> Tensor:
    """The same tokens as ones among zeros, ``(B, N)``."""
    places = open_tokens(logits, share)
    ones = torch.zeros(logits.numel(), device=logits.device).index_fill_(0, places, 1.0)
    return ones.view_as(logits)


def kept_tokens(tokens: int, share: float) -> int:
    """How many tokens a share of them is: rounded up to a multiple, at most all."""
    count = max(1, round(tokens * share))
    return min(tokens, count + -count % CAPACITY_MULTIPLE)
