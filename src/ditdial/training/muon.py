"""Muon: momentum whose matrices are made nearly orthogonal before they are taken as a step.

K. Jordan and others, "Muon: an optimizer for hidden layers in neural networks" (2024); steps have
the size of AdamW's as in "Muon is scalable for LLM training" (2502.16982), section 2.2. It is
`torch.optim.Muon` with two differences: torch has that since 2.9 only, and it iterates in bfloat16
everywhere, which on a CPU without such instructions takes four fifths of a training step of the
reference model.

Shape legend: M rows, N columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the iterated polynomial: singular values end between about 0.7 and 1.2."""

ITERATIONS = 5

TINY = 1e-7
"""Least norm that a matrix is divided by."""


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    Args:
        params: matrices.
        lr: for updates of AdamW's size.
        weight_decay: share of a weight that goes per step, times ``lr``.
        momentum: of the running mean of gradients.

    Raises:
        ValueError: a parameter that is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    shape = tuple(parameter.shape)
                    raise ValueError(f"Muon was given a parameter of shape {shape}; legal: (M, N)")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for weight_MN in group["params"]:
                if weight_MN.grad is None:
                    continue
                state, gradient_MN = self.state[weight_MN], weight_MN.grad
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient_MN)
                mean_MN = state["momentum_buffer"].lerp_(gradient_MN, 1 - momentum)
                update_MN = orthogonal(gradient_MN.lerp(mean_MN, momentum))
                weight_MN.mul_(1 - lr * group["weight_decay"])
                weight_MN.add_(update_MN, alpha=-lr * 0.2 * max(weight_MN.shape) ** 0.5)
        return loss


def orthogonal(x_MN: Tensor) -> Tensor:
    """About ``U V^T`` of ``x = U S V^T``, by Newton and Schulz's iteration, ``(M, N)``.

    In bfloat16 on a GPU, else in the dtype of ``x``, which the result has in any case.
    """
    a, b, c = COEFFICIENTS
    wide = x_MN if x_MN.shape[0] <= x_MN.shape[1] else x_MN.T
    y = wide.bfloat16() if x_MN.is_cuda else wide
    y = y / y.norm().clamp(min=TINY)
    for _ in range(ITERATIONS):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y if wide is x_MN else y.T).to(x_MN.dtype)
