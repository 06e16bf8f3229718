"""Positions of coarse tokens: centres of their groups, in base-grid units (FlexiDiT, section 3).

Shape legend: N tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditdial.ops.patching import Triple, group


def group_centres(
    length: int, k: int, device: torch.device | str = "cpu", *, first: bool = False
) -> Tensor:
    """Centres ``(i + 0.5) k - 0.5`` of the groups along an axis of ``length`` base tokens.

    Args:
        first: the places ``i k`` of their first tokens instead.
    """
    count = -(-length // k)
    places = torch.arange(count, dtype=torch.float64, device=device)
    return places * k if first else (places + 0.5) * k - 0.5


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


def sincos_3d(frames: Tensor, rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Table ``(frames*rows*columns, dim)``, row-major; the first quarter of it encodes frames."""
    space = sincos_2d(rows, columns, dim // 4 * 3)
    time = sincos_1d(frames, dim // 4).repeat_interleave(len(space), dim=0)
    return torch.cat([time, space.repeat(len(frames), 1)], dim=1)


def rotary_centres(table: Tensor, scale: tuple[int, int, int]) -> Tensor:
    """Reduce rotary phases of a grid to the centres of its groups.

    A group's centre lies between the two tokens next to it, whose unit vectors are added and
    brought back to length one. This needs no frequencies and is exact for every scale, as long as
    neighbours turn by less than half a circle against each other.

    Args:
        table: complex phases ``(T, H, W, X)``, each a product of one phase per axis; sides must be
            multiples of the scale.

    Returns:
        ``(t, h, w, X)``
    """
    for axis, k in enumerate(scale):
        if k == 1:
            continue
        groups = table.unflatten(axis, (-1, k))
        after = groups.select(axis + 1, k // 2)
        table = after if k % 2 else after + groups.select(axis + 1, k // 2 - 1)
    return table if scale == (1, 1, 1) else table / table.abs()


def real_rotary_centres(
    cos_ND: Tensor, sin_ND: Tensor, grid: Triple, scale: Triple
) -> tuple[Tensor, Tensor]:
    """`rotary_centres` of phases given as cosines and sines of a whole grid's tokens.

    Where the scale does not divide the grid, the phases go on as they went between its last two
    tokens.

    Returns:
        Cosines and sines ``(n, D)``.
    """
    table = torch.complex(cos_ND, sin_ND).unflatten(0, grid)
    for axis, k in enumerate(scale):
        if missing := -table.shape[axis] % k:
            last, before = table.narrow(axis, -1, 1), table.narrow(axis, -2, 1)
            more = [last * (last * before.conj()) ** i for i in range(1, missing + 1)]
            table = torch.cat([table, *more], dim=axis)
    centres = rotary_centres(table, scale).flatten(0, 2)
    return centres.real, centres.imag


def coordinate_centres(coordinates_B3N: Tensor, grid: Triple, scale: Triple) -> Tensor:
    """Mean coordinates ``(B, 3, n)`` of groups; a ragged border goes on at its last step."""
    x = coordinates_B3N.transpose(1, 2).unflatten(1, grid)
    for axis, k in enumerate(scale, start=1):
        if missing := -x.shape[axis] % k:
            last, before = x.narrow(axis, -1, 1), x.narrow(axis, -2, 1)
            more = [last + i * (last - before) for i in range(1, missing + 1)]
            x = torch.cat([x, *more], dim=axis)
    return group(x, scale).unflatten(2, (-1, 3)).mean(dim=2).transpose(1, 2)


def table_centres(table_HWD: Tensor, scale: tuple[int, ...], *, first: bool = False) -> Tensor:
    """Reduce a stored position table, of a picture or a video, to the centres of its groups.

    A centre between two tokens gets the mean of their vectors. A border that the scale does not
    divide is continued by its last row and column.

    Args:
        first: take the vectors of the groups' first tokens instead.

    Returns:
        ``(h*w, D)`` or ``(t*h*w, D)``, row-major
    """
    for axis, k in enumerate(scale):
        if k == 1:
            continue
        length = table_HWD.shape[axis]
        starts = torch.arange(0, length, k, device=table_HWD.device)
        middle = (0, 0) if first else (k // 2, (k - 1) // 2)
        after, before = (
            table_HWD.index_select(axis, (starts + each).clamp(max=length - 1)) for each in middle
        )
        table_HWD = (before + after) / 2
    return table_HWD.flatten(0, len(scale) - 1)
