"""Coarse tokens are groups of base tokens (FlexiDiT section 3; PPFlow section 3).

One coarse token covers ``k x k`` base patches. Its embedding is one linear map of the ``k*k`` base
patch vectors, its de-embedding one linear map back, so the base model's own patchify and
un-patchify never change.

Shape legend: B batch, H W base grid, h w coarse grid, N tokens, k patches per axis, p pixels per
base patch and axis, q pixels of another patch size, C channels, c = the length of one base patch
vector, D model width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RESIZES = ("box", "pinv")


def coarse_grid(height: int, width: int, k: int) -> tuple[int, int]:
    """Coarse grid of a base grid; a ragged border becomes a group of its own."""
    return math.ceil(height / k), math.ceil(width / k)


def group(x_BHWc: Tensor, k: int) -> Tensor:
    """Join each ``k x k`` neighbourhood of base tokens into one vector, row-major inside.

    A border that ``k`` does not divide is filled by repeating the last row and column.

    Returns:
        ``(B, h*w, k*k*c)``
    """
    B, H, W, c = x_BHWc.shape
    h, w = coarse_grid(H, W, k)
    if (h * k, w * k) != (H, W):
        x_BcHW = F.pad(x_BHWc.permute(0, 3, 1, 2), (0, w * k - W, 0, h * k - H), mode="replicate")
        x_BHWc = x_BcHW.permute(0, 2, 3, 1)
    x = x_BHWc.reshape(B, h, k, w, k, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h * w, k * k * c)


def ungroup(x_BNkc: Tensor, height: int, width: int, k: int) -> Tensor:
    """The inverse of `group`; the filled border is cut off.

    Returns:
        ``(B, H*W, c)``
    """
    B, _, kkc = x_BNkc.shape
    h, w = coarse_grid(height, width, k)
    c = kkc // (k * k)
    x = x_BNkc.reshape(B, h, w, k, k, c).permute(0, 1, 3, 2, 4, 5).reshape(B, h * k, w * k, c)
    return x[:, :height, :width].reshape(B, height * width, c)


def interpolation_matrix(p: int, q: int, kind: str) -> Tensor:
    """Matrix ``(q, p)`` in float64 that resizes ``p`` samples to ``q >= p``; rows sum to one.

    Args:
        kind: ``nearest`` or ``bilinear`` (half-pixel centres, edges clamped).
    """
    centres = (torch.arange(q, dtype=torch.float64) + 0.5) * p / q - 0.5
    if kind == "nearest":
        return F.one_hot(centres.round().long().clamp(0, p - 1), p).double()
    centres = centres.clamp(0, p - 1)
    low = centres.floor().long().clamp(max=max(p - 2, 0))
    fraction = centres - low
    matrix = torch.zeros(q, p, dtype=torch.float64)
    rows = torch.arange(q)
    matrix[rows, low] += 1 - fraction
    matrix[rows, (low + 1).clamp(max=p - 1)] += fraction
    return matrix


def embed_resize(p: int, q: int, kind: str = "pinv") -> Tensor:
    """Matrix ``(q, p)`` that turns an embedding kernel of patch ``p`` into one of ``q``, per axis.

    Columns sum to one, so a constant image gives the same token at every size (a bilinear resize of
    the kernel itself would be ``(q/p)**2`` too large).

    Args:
        kind: ``box`` (each tap repeated and divided: the coarse patch is averaged down; PPFlow's
            release) or ``pinv`` (FlexiViT's pseudo-inverse resize: exact on patches that are
            upsampled base patches).

    Raises:
        ValueError: unknown kind, or sizes of which neither divides the other.
    """
    _check_sizes(p, q, kind)
    if q <= p:  # the kernel acts on the patch copied up to p: sums of taps, exact for box kernels
        return interpolation_matrix(q, p, "nearest").T.contiguous()
    if kind == "box":
        return interpolation_matrix(p, q, "nearest") * (p / q)
    return torch.linalg.pinv(interpolation_matrix(p, q, "bilinear").T)


def output_resize(p: int, q: int, kind: str = "pinv") -> Tensor:
    """Matrix ``(q, p)`` that turns an output patch of ``p`` into one of ``q``, per axis.

    Rows sum to one.

    Args:
        kind: ``box`` copies samples (nearest), ``pinv`` interpolates bilinearly. Going down, both
            average.
    """
    _check_sizes(p, q, kind)
    if q <= p:
        return interpolation_matrix(q, p, "nearest").T * (q / p)
    return interpolation_matrix(p, q, "nearest" if kind == "box" else "bilinear")


def _check_sizes(p: int, q: int, kind: str) -> None:
    if kind not in RESIZES:
        raise ValueError(f"resize kind {kind!r} is unknown; legal kinds: {', '.join(RESIZES)}")
    if min(p, q) < 1 or max(p, q) % min(p, q):
        raise ValueError(
            f"patch sizes {p} and {q}: the larger must be a whole multiple of the smaller"
        )


def resize_embedding(weight_DCpp: Tensor, q: int, kind: str = "pinv") -> Tensor:
    """Embedding kernel ``(D, C, p, p)`` for patch size ``q``, computed in float64."""
    matrix = embed_resize(weight_DCpp.shape[-1], q, kind).to(weight_DCpp.device)
    resized = torch.einsum("yp,xq,dcpq->dcyx", matrix, matrix, weight_DCpp.double())
    return resized.to(weight_DCpp.dtype)


def resize_output(weight_ppX: Tensor, q: int, kind: str = "pinv") -> Tensor:
    """Output rows ``(p, p, ...)``, weight or bias, for patch size ``q``: ``(q, q, ...)``."""
    matrix = output_resize(weight_ppX.shape[0], q, kind).to(weight_ppX.device)
    resized = torch.einsum("yp,xq,pq...->yx...", matrix, matrix, weight_ppX.double())
    return resized.to(weight_ppX.dtype)


def kernel_to_group(weight_DCqq: Tensor, k: int) -> Tensor:
    """Kernel over a coarse patch -> matrix ``(D, k*k*c)`` over grouped base patch vectors.

    The base patch vector is laid out ``(C, p, p)``, as a flattened convolution kernel is.
    """
    D, C, q, _ = weight_DCqq.shape
    p = q // k
    return (
        weight_DCqq.reshape(D, C, k, p, k, p)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(D, k * k * C * p * p)
    )


def output_to_group(weight_qqX: Tensor, k: int) -> Tensor:
    """Output rows over a coarse patch ``(q, q, C, ...)`` -> rows over grouped base vectors.

    Returns:
        ``(k*k*c, ...)``, the base vectors laid out ``(p, p, C)``.
    """
    q, _, C, *rest = weight_qqX.shape
    p = q // k
    split = weight_qqX.reshape(k, p, k, p, C, *rest)
    return split.movedim(2, 1).reshape(k * k * p * p * C, *rest)
