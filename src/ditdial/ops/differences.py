"""How quietly a latent moves: derivatives along a trajectory, and their spread inside blocks.

DDiT (2602.16968) takes the third difference of the last four latents and its standard deviation
inside blocks of the size of a patch. A plain difference shrinks with the third power of the step
and is wrong where steps are not even, so that a threshold would hold for one step count only. Here
it is a divided difference on the noise levels times the factorial of its order: an estimate of the
derivative, whatever the steps.

Shape legend: B pictures, T H W base grid, C channels, p pixels of one base patch, K blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ditdial.ops.patching import Triple


def derivative(values: Sequence[Tensor], points: Sequence[float]) -> Tensor:
    """The derivative of order ``len(values) - 1``: zero on polynomials below it, exact on its own.

    Args:
        values: of one shape, in the order of the points.
        points: all different, in any spacing.

    Raises:
        ValueError: fewer than two values, another number of points, or two equal points.
    """
    if len(values) < 2 or len(points) != len(values):
        raise ValueError(
            f"{len(values)} values at {len(points)} points; legal: at least two, as many of each"
        )
    if len(set(points)) < len(points):
        raise ValueError(f"points = {list(points)}; legal: all different")
    table, order = list(values), len(values) - 1
    for k in range(1, order + 1):  # Newton's scheme, in place
        table = [
            (above - below) / (points[i + k] - points[i])
            for i, (below, above) in enumerate(zip(table, table[1:], strict=False))
        ]
    return table[0] * math.factorial(order)


def block_spread(x_BTHWCp: Tensor, scale: Triple) -> Tensor:
    """Standard deviation inside each block of base patches, per channel, then mean of the channels.

    Blocks that the border cuts are left out.

    Args:
        scale: base patches of a block along time, height and width; at most the grid.

    Returns:
        ``(B, K)``
    """
    B, T, H, W, C, p = x_BTHWCp.shape
    t, h, w = (side // k for side, k in zip((T, H, W), scale, strict=True))
    kt, kh, kw = scale
    x = x_BTHWCp[:, : t * kt, : h * kh, : w * kw].reshape(B, t, kt, h, kh, w, kw, C, p)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6, 8).reshape(B, t * h * w, C, kt * kh * kw * p)
    return x.std(dim=-1, correction=0).mean(dim=-1)


def roughness(x_BTHWCp: Tensor, scale: Triple, rho: float) -> Tensor:
    """The ``rho``-quantile over blocks of `block_spread`, ``(B,)``.

    A quantile rather than the mean, so that a flat background does not hide what moves (DDiT).
    """
    return torch.quantile(block_spread(x_BTHWCp, scale).float(), rho, dim=1)
