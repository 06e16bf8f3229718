"""Contact sheets: a batch of images as one, to look at."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ditdial.evaluation.features import check_images
from ditdial.plain import files
from ditdial.plain.checks import require

GAP = 2
GAP_VALUE = 255


def contact_sheet(images: Tensor, columns: int) -> np.ndarray:
    """Lay images out row by row with white gaps of 2 pixels; the last row may stay unfilled.

    Args:
        images: ``(B, C, h, w)`` in [0, 1].
        columns: images per row.

    Returns:
        uint8 ``(H, W, C)``, with ``W = columns * (w + 2) - 2`` and ``H`` likewise.

    Raises:
        ValueError: no column, not float images, values outside [0, 1].
    """
    check_images(images)
    require(columns >= 1, "columns", columns, ">= 1")
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    shape = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels)
    sheet = np.full(shape, GAP_VALUE, dtype=np.uint8)
    for index, tile in enumerate(pixels.cpu().numpy()):
        row, column = divmod(index, columns)
        top, left = row * (height + GAP), column * (width + GAP)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def save_png(path: str | Path, array: np.ndarray) -> None:
    """Write a PNG, complete or not at all.

    Args:
        path: of the file; folders above it are made.
        array: uint8 ``(H, W, C)`` with 1 or 3 channels.

    Raises:
        OSError: the file cannot be written.
        ValueError: another shape or dtype.
    """
    legal = "uint8 (H, W, 1) or (H, W, 3)"
    shaped = array.ndim == 3 and array.shape[2] in (1, 3) and array.size > 0
    require(shaped and array.dtype == np.uint8, "array", f"{array.dtype} {array.shape}", legal)
    buffer = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, format="PNG")
    files.write(path, buffer.getvalue())
