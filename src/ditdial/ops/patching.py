"""Coarse tokens are groups of base tokens (FlexiDiT section 3; PPFlow section 3).

One coarse token covers ``kt x kh x kw`` base patches. Its embedding is one linear map of the base
patch vectors it covers, its de-embedding one linear map back, so the base model's own patchify and
un-patchify never change.

Shape legend: B batch, T H W base grid, t h w coarse grid, N tokens, k patches per axis, p pixels
per base patch and axis (``(pt, ph, pw)``), q the same of another patch size, C channels, c = the
length of one base patch vector, D model width. Pictures have T = pt = kt = 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Triple = tuple[int, int, int]

Resize = Callable[[int, int, str], Tensor]

RESIZES = ("box", "pinv")


def coarse_grid(grid: Triple, scale: Triple) -> Triple:
    """Coarse grid of a base grid; a ragged border becomes a group of its own."""
    t, h, w = (-(-side // k) for side, k in zip(grid, scale, strict=True))  # sides may be symbols
    return t, h, w


def group(x_BTHWc: Tensor, scale: Triple) -> Tensor:
    """Join the base vectors that each coarse token covers, row-major inside.

    A border that the scale does not divide is filled by repeating the last frame, row and column.

    Returns:
        ``(B, t*h*w, kt*kh*kw*c)``
    """
    B, *grid, c = x_BTHWc.shape
    (t, h, w), (kt, kh, kw) = coarse_grid((grid[0], grid[1], grid[2]), scale), scale
    for axis, (side, whole) in enumerate(zip(grid, (t * kt, h * kh, w * kw), strict=True), start=1):
        if whole != side:
            last = x_BTHWc.narrow(axis, side - 1, 1)
            sizes = [-1] * 5
            sizes[axis] = whole - side
            x_BTHWc = torch.cat([x_BTHWc, last.expand(sizes)], dim=axis)
    x = x_BTHWc.reshape(B, t, kt, h, kh, w, kw, c).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(B, t * h * w, kt * kh * kw * c)


def group_means(x_BNc: Tensor, grid: Triple, scale: Triple) -> Tensor:
    """Means of something per base token over the tokens that each coarse one covers.

    Returns:
        ``(B, t*h*w, c)``
    """
    return group(x_BNc.unflatten(1, grid), scale).unflatten(2, (-1, x_BNc.shape[2])).mean(dim=2)


def ungroup(x_BNkc: Tensor, grid: Triple, scale: Triple) -> Tensor:
    """The inverse of `group`; the filled border is cut off.

    Returns:
        ``(B, T*H*W, c)``
    """
    B, _, kkc = x_BNkc.shape
    (t, h, w), (kt, kh, kw) = coarse_grid(grid, scale), scale
    c = kkc // (kt * kh * kw)
    x = x_BNkc.reshape(B, t, h, w, kt, kh, kw, c).permute(0, 1, 4, 2, 5, 3, 6, 7)
    x = x.reshape(B, t * kt, h * kh, w * kw, c)[:, : grid[0], : grid[1], : grid[2]]
    return x.reshape(B, -1, c)


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


def resize_embedding(weight_DCp: Tensor, size: Triple, kind: str = "pinv") -> Tensor:
    """Embedding kernel ``(D, C, pt, ph, pw)`` for patches of ``size``, computed in float64."""
    return _resize(weight_DCp, size, embed_resize, kind)


def resize_output(rows_XCp: Tensor, size: Triple, kind: str = "pinv") -> Tensor:
    """Output rows ``(X, C, pt, ph, pw)``, weight (X = D) or bias (X = 1), for ``size``."""
    return _resize(rows_XCp, size, output_resize, kind)


def _resize(weight: Tensor, size: Triple, matrix_of: Resize, kind: str) -> Tensor:
    resized = weight.double()
    for axis, q in enumerate(size, start=2):
        matrix = matrix_of(weight.shape[axis], q, kind).to(resized.device)
        resized = torch.tensordot(resized, matrix, dims=([axis], [1])).movedim(-1, axis)
    return resized.to(weight.dtype)


def to_grouped(weight_XCq: Tensor, scale: Triple, layout: str) -> Tensor:
    """Kernel or rows over a coarse patch -> matrix ``(X, kt*kh*kw*c)`` over grouped base vectors.

    Args:
        weight_XCq: ``(X, C, kt*pt, kh*ph, kw*pw)``.
        layout: order of the axes inside one base vector: ``Cthw`` or ``thwC``.
    """
    X, C, *size = weight_XCq.shape
    (qt, qh, qw), (kt, kh, kw) = size, scale
    split = weight_XCq.reshape(X, C, kt, qt // kt, kh, qh // kh, kw, qw // kw)
    axes = {"C": 1, "t": 3, "h": 5, "w": 7}
    return split.permute(0, 2, 4, 6, *(axes[axis] for axis in layout)).reshape(X, -1)


def from_base(matrix_Xc: Tensor, channels: int, patch: Triple, layout: str) -> Tensor:
    """Matrix ``(X, c)`` over one base vector -> kernel or rows ``(X, C, pt, ph, pw)``."""
    sizes = {"C": channels, "t": patch[0], "h": patch[1], "w": patch[2]}
    split = matrix_Xc.reshape(len(matrix_Xc), *(sizes[axis] for axis in layout))
    return split.permute(0, *(1 + layout.index(axis) for axis in "Cthw"))
