"""Fewer tokens for a while: averages over windows of a token grid, and the way back.

SparseDiT (2412.06028, section 3) pools a dense grid of tokens to a smaller one of any size and
spreads it again. Windows are those of adaptive pooling, ``[floor(i n / m), ceil((i + 1) n / m))``;
where the sides do not divide, they overlap, and their middles stay mirror images of each other.
Both ways of spreading put every sparse token back where its window's middle is, in the mean over
the grid exactly.

Shape legend: B batch, N dense tokens, M sparse tokens, D width, X phases per token. A dense side is
``n``, a sparse one ``m``. Frames of a video count as rows of the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Sides = tuple[int, int]

UPSAMPLES = ("bilinear", "nearest-exact")


def pool_tokens(x_BND: Tensor, dense: Sides, sparse: Sides) -> Tensor:
    """Average tokens ``(B, N, D)`` of one or more ``dense`` grids over windows: ``(B, M, D)``."""
    return _as_tokens(F.adaptive_avg_pool2d(_as_images(x_BND, dense), sparse), len(x_BND))


def spread_tokens(x_BMD: Tensor, sparse: Sides, dense: Sides, kind: str = "bilinear") -> Tensor:
    """Spread sparse tokens ``(B, M, D)`` over a dense grid: ``(B, N, D)``.

    Args:
        kind: ``bilinear`` between the middles of windows, or ``nearest-exact``: a dense token is
            that of its nearest middle, or the mean of two where it lies half-way between them.
    """
    images = _as_images(x_BMD, sparse)
    if kind == "bilinear":
        wide = F.interpolate(images, size=dense, mode="bilinear", align_corners=False)
    else:
        pairs = zip((2, 3), sparse, dense, strict=True)
        wide = _nearest(images, dense, [axis for axis, m, n in pairs if _has_ties(m, n)])
    return _as_tokens(wide, len(x_BMD))


def window_middles(n: int, m: int) -> list[float]:
    """Middles of the ``m`` windows along an axis of ``n`` tokens: whole or half numbers."""
    starts = [i * n // m for i in range(m)]
    stops = [-(-(i + 1) * n // m) for i in range(m)]
    return [(start + stop - 1) / 2 for start, stop in zip(starts, stops, strict=True)]


def pool_phases(
    cos_NX: Tensor, sin_NX: Tensor, dense: Sides, sparse: Sides
) -> tuple[Tensor, Tensor]:
    """Rotary phases at the middles of the windows, from those of one or more dense grids.

    A middle between two tokens gets the sum of their unit vectors, brought back to length one.
    Phases must be products of one phase per axis, and neighbours turn by less than half a circle.

    Returns:
        Cosines and sines ``(M, X)``.
    """
    table = torch.complex(cos_NX, sin_NX).unflatten(0, (-1, *dense))
    for axis, n, m in zip((1, 2), dense, sparse, strict=True):
        middles = torch.tensor(window_middles(n, m), device=table.device)
        before = table.index_select(axis, middles.floor().long())
        table = before + table.index_select(axis, middles.ceil().long())
        table = table / table.abs()
    table = table.flatten(0, 2)
    return table.real, table.imag


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of features by phases that are given twice each, in float32.

    Args:
        x: ``(B, N, heads, X)``.
        cos, sin: broadcast against ``x``.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


def _as_images(x_BND: Tensor, sides: Sides) -> Tensor:
    """``(B, T*h*w, D)`` -> ``(B*T, D, h, w)``, a view with channels last in memory."""
    return x_BND.unflatten(1, (-1, *sides)).flatten(0, 1).permute(0, 3, 1, 2)


def _as_tokens(images: Tensor, rows: int) -> Tensor:
    tokens = images.permute(0, 2, 3, 1).flatten(1, 2)
    return tokens.reshape(rows, -1, tokens.shape[-1])


def _has_ties(m: int, n: int) -> bool:
    """Whether some of ``n`` tokens lies half-way between two of ``m`` cells."""
    return m < n and any((2 * i + 1) * m % (2 * n) == 0 for i in range(n))


def _nearest(images: Tensor, size: Sides, ties: list[int]) -> Tensor:
    """Nearest-exact spreading; along axes with ties, its mean with its own mirror image."""
    if not ties:
        return F.interpolate(images, size=size, mode="nearest-exact")
    axis, *rest = ties
    mirrored = _nearest(images.flip(axis), size, rest).flip(axis)
    return (_nearest(images, size, rest) + mirrored) / 2
