"""Images and labels through `datasets`, decoded once, served by position.

Which image is drawn at which position of a run is a pure function of (seed, position), so a run can
stop and go on anywhere, on any number of processes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ditdial.training.config import DataConfig


class ImageData:
    """A decoded data set: ``images`` uint8 ``(n, C, S, S)``, ``labels`` int64 ``(n,)``.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: missing column, empty split, broken image (with its row), or an image larger
            than ``image_size``.
    """

    def __init__(self, config: DataConfig, *, limit: int | None = None) -> None:
        self.config = config
        table = _open(config)
        if limit is not None:
            table = table.select(range(min(limit, len(table))))
        side, channels = config.image_size, config.channels
        pixels = np.full((len(table), side, side, channels), config.pad_value, dtype=np.uint8)
        for row, item in enumerate(table[config.image_column]):
            _paste(pixels[row], item, row, config)
        self.images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.tensor(table[config.label_column][:], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> ImageData:
        """Move pixels and labels to a device, in place."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def batch(
        self, start: int, size: int, seed: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Normalised images ``(size, C, S, S)`` and labels from position ``start`` of a run on."""
        indices = sample_order(len(self), start, size, seed)
        images = self.images[indices.to(self.images.device)].to(device)
        images = (images.float() / 255 - self.config.mean) / self.config.std
        if self.config.horizontal_flip:
            flip = flip_choices(len(self), start, size, seed).to(device)
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        return images, self.labels[indices.to(self.labels.device)].to(device)


def sample_order(count: int, start: int, size: int, seed: int) -> Tensor:
    """Indices at positions ``start .. start+size`` of an endless shuffle of ``count`` items."""
    return _stream(count, start, size, seed, lambda g: torch.randperm(count, generator=g))


def flip_choices(count: int, start: int, size: int, seed: int) -> Tensor:
    """Whether the picture at each of these positions is mirrored; however they are batched."""
    return _stream(count, start, size, ~seed, lambda g: torch.rand(count, generator=g) < 0.5)


def _stream(
    count: int, start: int, size: int, seed: int, epoch_of: Callable[[torch.Generator], Tensor]
) -> Tensor:
    """A slice of the endless stream of epochs, each made by its own generator."""
    parts = []
    while size > 0:
        epoch, offset = divmod(start, count)
        part = epoch_of(torch.Generator().manual_seed(seed * 1_000_003 + epoch))[offset:][:size]
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return torch.cat(parts)


def _open(config: DataConfig) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading training data needs: pip install 'ditdial[train]'") from error
    folder = Path(config.path).expanduser()
    looks_local = folder.is_absolute() or config.path.startswith((".", "~"))
    if looks_local and not folder.is_dir():
        raise FileNotFoundError(f"data.path = {config.path!r} is not a folder")
    split = datasets.load_dataset(
        str(folder) if folder.is_dir() else config.path, split=config.split
    )
    for name in (config.image_column, config.label_column):
        if name not in split.column_names:
            raise ValueError(
                f"data set {config.path!r} has no column {name!r}; it has {split.column_names}"
            )
    if len(split) == 0:
        raise ValueError(f"data set {config.path!r}, split {config.split!r}, is empty")
    # Bytes rather than decoded images, so that a broken one is reported with its row by us, before
    # any work.
    return split.cast_column(config.image_column, datasets.Image(decode=False))


def _paste(canvas: np.ndarray, item: dict[str, Any] | None, row: int, config: DataConfig) -> None:
    if item is None or not (item["bytes"] or item["path"]):
        raise ValueError(f"data set {config.path!r}: row {row} has no image")
    source = io.BytesIO(item["bytes"]) if item["bytes"] else item["path"]
    name = item["path"] or f"row {row}"
    try:
        with Image.open(source) as image:
            pixels = np.asarray(image.convert("L" if config.channels == 1 else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(
            f"data set {config.path!r}: image {name!r} (row {row}) cannot be read: {error}"
        ) from error
    height, width = pixels.shape[:2]
    side = config.image_size
    if height > side or width > side:
        raise ValueError(
            f"data set {config.path!r}: image {name!r} (row {row}) is {width}x{height}; "
            f"legal: at most data.image_size = {side} pixels a side"
        )
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = pixels.reshape(height, width, config.channels)
