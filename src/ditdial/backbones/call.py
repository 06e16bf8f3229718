"""The arguments of one model call, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditdial.ops.patching import Triple, group
from ditdial.plan.mode import Mode

Call = dict[str, Any]
"""The arguments of one model call by name."""


@dataclass(frozen=True)
class Branches:
    """Which rows of a batched call are conditional, and which guide them; row i guides row i."""

    conditional: slice
    guidance: slice


def cut(value: Any, index: slice | tuple[int, ...], total: int) -> Any:
    """Some of ``total`` rows of an argument, inside lists and dictionaries too."""
    if isinstance(value, dict):
        return {key: cut(inner, index, total) for key, inner in value.items()}
    if isinstance(value, list):
        return [cut(inner, index, total) for inner in value]
    if torch.is_tensor(value) and value.ndim and value.shape[0] == total:
        return value[index if isinstance(index, slice) else list(index)]
    return value


def has_token_times(call: Call) -> bool:
    """Whether each base token has a time of its own, ``(B, N)`` or ``(B, N, 1)``."""
    times = call["timestep"]
    return times.ndim > 1 and times.shape[1] > 1


def grouped_times(times: Tensor, grid: Triple, mode: Mode) -> Tensor:
    """Times of a mode's tokens ``(B, n)`` from those of base tokens.

    A group is as noisy as its noisiest token; frames that are given fill groups of their own only
    if the mode joins none.

    Raises:
        ValueError: there is not one time for each base token.
    """
    times_BN, tokens = times.flatten(1), math.prod(grid)
    if times_BN.shape[1] != tokens:
        raise ValueError(
            f"timestep has {times_BN.shape[1]} times in a row; legal in coarse modes: 1, or "
            f"{tokens} (one for each base token)"
        )
    return group(times_BN.unflatten(1, grid)[..., None], mode.patch_scale).amax(dim=2)
