"""Images and labels through `datasets`, decoded once, served by position.

Which image is drawn at which position of a run is a pure function of (seed, position), so a run can
stop and go on anywhere, on any number of processes.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ditdial.training.config import DataConfig
from ditdial.training.limits import require_memory


class ImageData:
    """A decoded data set: ``images`` uint8 ``(n, C, S, S)``, ``labels`` int64 ``(n,)``.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: damaged file, missing column, empty split; a row with a broken image, one that
            lies outside the data's folder, one larger than ``image_size``, or with a label that is
            no class.
    """

    def __init__(self, config: DataConfig, *, limit: int | None = None) -> None:
        self.config = config
        with _naming(config):
            table = _open(config)
        if limit is not None:
            table = table.select(range(min(limit, len(table))))
        side, channels = config.image_size, config.channels
        size, what = len(table) * side * side * channels, f"{len(table)} pictures"
        require_memory(size, "data.image_size", side, what)
        pixels = np.full((len(table), side, side, channels), config.pad_value, dtype=np.uint8)
        roots = _roots(config)
        for row, item in enumerate(_items(table, config)):
            _paste(pixels[row], item, row, config, roots)
        self.images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        self.labels = _labels(table, config)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> ImageData:
        """Move pixels and labels to a device, in place."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def check_labels(self, classes: int) -> None:
        """Refuse labels that a task with so many classes does not have.

        Raises:
            ValueError: naming the first row and its label.
        """
        over = (self.labels >= classes).nonzero()
        if len(over):
            row = int(over[0])
            raise ValueError(
                f"data set {self.config.path!r}: row {row} has the label {int(self.labels[row])}; "
                f"legal: 0..{classes - 1}, as num_classes of the model says"
            )

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


def splits(config: DataConfig) -> list[str]:
    """Names of the splits of a data set.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    with _naming(config):
        import datasets

        return datasets.get_dataset_split_names(_source(config))


@contextlib.contextmanager
def _naming(config: DataConfig) -> Iterator[None]:
    """Errors of the libraries that read data, of any class, name the data set."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        # What is wrong with a file stands in the first of a chain of errors.
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        told = str(error) if reason is error else f"{error} ({reason})"
        raise ValueError(
            f"data set {config.path!r}, split {config.split!r}, cannot be read: {told}"
        ) from error


def _source(config: DataConfig) -> str:
    folder = Path(config.path).expanduser()
    looks_local = folder.is_absolute() or config.path.startswith((".", "~"))
    if looks_local and not folder.is_dir():
        raise FileNotFoundError(f"data.path = {config.path!r} is not a folder")
    return str(folder) if folder.is_dir() else config.path


def _open(config: DataConfig) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading training data needs: pip install 'ditdial[train]'") from error
    split = datasets.load_dataset(_source(config), split=config.split)
    if not isinstance(split, datasets.Dataset):
        raise ValueError(f"data.split = {config.split!r} is not one split")
    for field in ("image_column", "label_column"):
        if (name := getattr(config, field)) not in split.column_names:
            columns = f"it has {split.column_names}, and data.{field} names one of them"
            raise ValueError(f"it has no column {name!r}; {columns}")
    if len(split) == 0:
        raise ValueError("it is empty")
    # Bytes rather than decoded images, so that a broken one is reported with its row by us, before
    # any work.
    return split.cast_column(config.image_column, datasets.Image(decode=False))


def _items(table: Any, config: DataConfig) -> Iterator[dict[str, Any] | None]:
    with _naming(config):
        yield from table[config.image_column]


def _roots(config: DataConfig) -> list[Path]:
    """Folders that hold the files which rows may name, links resolved; relative ones are in the
    first."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(config.path).expanduser()
    held = [folder] if folder.is_dir() else [HF_HUB_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH]
    return [Path(root).resolve() for root in (*held, datasets.config.EXTRACTED_DATASETS_PATH)]


def _paste(
    canvas: np.ndarray, item: dict[str, Any] | None, row: int, config: DataConfig, roots: list[Path]
) -> None:
    if item is None or not (item["bytes"] or item["path"]):
        raise ValueError(f"data set {config.path!r}: row {row} has no image")
    name = f"data set {config.path!r}: image {item['path'] or f'row {row}'!r} (row {row})"
    source = io.BytesIO(item["bytes"]) if item["bytes"] else _inside(item["path"], roots, name)
    side, mode = config.image_size, "L" if config.channels == 1 else "RGB"
    try:
        with warnings.catch_warnings(), Image.open(source) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below
            width, height = image.size
            fits = height <= side and width <= side
            pixels = np.asarray(image.convert(mode)) if fits else None
    except Exception as error:  # broken pictures raise errors of some ten classes
        raise ValueError(f"{name} cannot be read: {error}") from error
    if pixels is None:
        raise ValueError(
            f"{name} is {width}x{height}; legal: at most data.image_size = {side} pixels a side"
        )
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = pixels.reshape(height, width, config.channels)


def _inside(path: str, roots: list[Path], name: str) -> Path:
    """A file that a row names, if it is one and lies in the data's folder."""
    file = (roots[0] / path).resolve()
    if not any(file.is_relative_to(root) for root in roots):
        raise ValueError(f"{name} lies outside the data; legal: files in {str(roots[0])!r}")
    if not file.is_file():
        raise ValueError(f"{name} cannot be read: it is no file")
    return file


def _labels(table: Any, config: DataConfig) -> Tensor:
    with _naming(config):
        labels = table[config.label_column][:]
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < 2**31:
            raise ValueError(
                f"data set {config.path!r}: row {row} has {label!r} in column "
                f"{config.label_column!r}; legal: whole numbers >= 0"
            )
    return torch.tensor(labels, dtype=torch.int64)
