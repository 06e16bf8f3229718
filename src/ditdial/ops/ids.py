"""Position ids of packed tokens: the grid that they name, and the centres of its groups.

Ids are rows of numbers, one row for each token.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from ditdial.ops.patching import Triple
from ditdial.ops.positions import group_centres


def first_grid(ids: Tensor, skip: int = 0) -> Triple:
    """Base grid of the first picture in position ids ``(N, 3 or 4)``, ``skip`` tokens aside.

    The second and third number of an id are row and column; the first tells pictures apart.

    Raises:
        ValueError: the first picture's ids are not one whole grid, or an export cannot read them.
    """
    if torch.compiler.is_exporting():
        raise ValueError(
            "the grid stands in the numbers of img_ids, which are not known to an exported graph; "
            "legal: full mode"
        )
    ids = (ids[0] if ids.ndim == 3 else ids)[skip:]
    if ids.is_meta:  # no numbers to read: counting costs only
        side = math.isqrt(len(ids))
        return 1, side, len(ids) // side
    ids = ids.cpu()
    side = math.isqrt(len(ids))
    if side**2 == len(ids) and not torch.equal(ids, ids.round()):
        warnings.warn(
            f"img_ids are no rows and columns; the {len(ids)} tokens are taken for a square",
            stacklevel=2,
        )
        return 1, side, side
    ids = ids[ids[:, 0] == ids[0, 0]]
    height, width = (int(n) + 1 for n in ids[-1, 1:3] - ids[0, 1:3])
    if height * width != len(ids):
        raise ValueError(
            f"img_ids name {len(ids)} tokens up to row {height - 1} and column {width - 1}, which "
            "is no whole grid; legal: each picture row by row, under a number of its own"
        )
    return 1, height, width


def centre_ids(ids: Tensor, grid: Triple, scale: Triple) -> Tensor:
    """Position ids of the centres of groups, no longer whole numbers; then those behind them."""
    ids = ids[0] if ids.ndim == 3 else ids
    first, rest = ids[0].float(), ids[math.prod(grid) :]
    _, kh, kw = scale
    rows = group_centres(grid[1], kh, first.device).to(first) + first[1]
    columns = group_centres(grid[2], kw, first.device).to(first) + first[2]
    centres = first.repeat(len(rows) * len(columns), 1)
    centres[:, 1:3] = torch.cartesian_prod(rows, columns)
    return torch.cat([centres, rest.to(centres)])


def grid_of_coordinates(coordinates_3N: Tensor) -> Triple:
    """Sides of a grid whose tokens are named row-major; ``(1, 1, N)`` if they form none.

    Its frames may have any times: given ones stand behind the others, at times before them.
    """
    rows, columns = (axis.unique() for axis in coordinates_3N[1:])
    count = len(rows) * len(columns)
    frame = torch.cartesian_prod(rows, columns).T
    frames = coordinates_3N.shape[1] // count
    if frames * count == coordinates_3N.shape[1]:
        times = coordinates_3N[0, ::count].repeat_interleave(count)
        if torch.equal(torch.cat([times[None], frame.repeat(1, frames)]), coordinates_3N):
            return frames, len(rows), len(columns)
    return 1, 1, coordinates_3N.shape[1]
