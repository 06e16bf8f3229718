"""Positions of coarse tokens: centres of their groups, in base-grid units (FlexiDiT, section 3).

Shape legend: N tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_centres(length: int, k: int, device: torch.device | str = "cpu") -> Tensor:
    """Centres ``(i + 0.5) k - 0.5`` of the groups along an axis of ``length`` base tokens."""
    count = -(-length // k)
    return (torch.arange(count, dtype=torch.float64, device=device) + 0.5) * k - 0.5


def sincos_1d(positions_N: Tensor, dim: int) -> Tensor:
    """Sine-cosine table ``(N, dim)`` in the Transformer's frequencies; sines first."""
    exponent = torch.arange(dim // 2, dtype=torch.float64, device=positions_N.device) / (dim / 2)
    angles = torch.outer(positions_N.double(), 10000.0**-exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Table ``(rows*columns, dim)``, row-major; columns are encoded first, as in DiT's tables."""
    column_N = columns.repeat(len(rows))
    row_N = rows.repeat_interleave(len(columns))
    return torch.cat([sincos_1d(column_N, dim // 2), sincos_1d(row_N, dim // 2)], dim=1)
