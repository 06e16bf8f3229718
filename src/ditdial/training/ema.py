"""Exponential moving average of trained weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average in float32 of the parameters of a module that require gradients, by name."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {
            name: p.detach().float().clone()
            for name, p in module.named_parameters()
            if p.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present weights; early steps move faster."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_(
            list(self.average.values()),
            [parameters[name].detach().float() for name in self.average],
            1 - decay,
        )

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into the module."""
        parameters = dict(module.named_parameters())
        for name, value in self.average.items():
            parameters[name].copy_(value)

    def load(self, average: dict[str, Tensor], updates: int) -> None:
        """Take over a saved average."""
        for name, value in self.average.items():
            value.copy_(average[name])
        self.updates = updates
