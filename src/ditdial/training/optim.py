"""Optimisers and rate schedules: AdamW, or Muon on the matrices with AdamW on the rest."""

from __future__ import annotations

import math

import torch
from torch import nn

from ditdial.training.config import OptimConfig
from ditdial.training.muon import Muon

# Muon's orthogonalised update suits weights that map features to features. Embedding tables, the
# first and last projection and everything one-dimensional stay with AdamW (K. Jordan's Muon notes).
NOT_MUON = (
    "embedding_table",
    "proj_out_2",
    "pos_embed",
    "patch_embeds",
    "proj_outs",
    "size_embeds",
    "coarse_",
    "flex_",
)


def build_optimizers(module: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """One or two optimisers over the parameters of ``module`` that require gradients."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("nothing to train: no parameter requires a gradient")
    matrices: list[nn.Parameter] = []
    if config.name == "muon":
        matrices = [
            p for name, p in named if p.ndim == 2 and not any(word in name for word in NOT_MUON)
        ]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in taken]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, config.lr, weight_decay=config.weight_decay))
    if rest:
        optimizers.append(
            torch.optim.AdamW(
                rest, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay
            )
        )
    return optimizers


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Rate of ``step`` (counted from 0): linear warm-up, then constant or a half cosine to zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
