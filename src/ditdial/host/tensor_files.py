"""Safetensors files: written whole or not at all, read with errors that name them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditdial.plain import files

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""What weights may be stored as; other floats of eight bits and fewer need a scale beside them."""


def save(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    with files.writing(path) as partial:
        try:
            save_file(dict(tensors), partial, metadata=metadata)
        except SafetensorError as error:  # what the system says is in its text only
            raise OSError(f"{str(path)!r} cannot be written: {error}") from error


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is truncated, or no safetensors file, or holds numbers of a kind that torch
            has not got.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, ValueError, OSError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is truncated or no safetensors file: {error}") from error


def check_numbers(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are none of `FLOATS` and `WHOLE`, or hold NaN or infinity.

    Args:
        where: they are, for the error.

    Raises:
        ValueError: naming the first such tensor.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in (*FLOATS, *WHOLE):
            legal = ", ".join(map(str, (*FLOATS, *WHOLE)))
            raise ValueError(f"{where}: tensor {name!r} is {tensor.dtype}; legal: {legal}")
        # Eight-bit floats have no such test of their own.
        numbers = tensor.to(torch.float32) if tensor.dtype.itemsize == 1 else tensor
        if not numbers.isfinite().all():
            raise ValueError(
                f"{where}: tensor {name!r} holds NaN or infinite values; legal: finite numbers"
            )
