"""What adapters may be trained towards: the predictions of the trained base."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditdial.training.objectives import NoisyBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(eq=False)
class Teacher:
    """The base as it was before training.

    Args:
        dtype: of its forward pass, a key of ``DTYPES``; ``float32`` leaves the loop's precision.
    """

    model: nn.Module
    dtype: str = "float32"

    @classmethod
    def of(cls, model: nn.Module, dtype: str = "float32") -> Teacher:
        """A frozen copy of a stock model."""
        return cls(copy.deepcopy(model).eval().requires_grad_(False), dtype)

    def predict(self, batch: NoisyBatch) -> Tensor:
        """Its prediction for a batch, ``(B, C, H, W)`` in float32, without gradient."""
        with teaching(self.dtype, batch.x.device):
            output = self.model(batch.x, timestep=batch.times, class_labels=batch.labels)
        return output.sample.float()


@contextlib.contextmanager
def teaching(dtype: str, device: torch.device) -> Iterator[None]:
    """No gradients, in the teacher's precision."""
    reduced = contextlib.nullcontext()
    if dtype != "float32":
        reduced = torch.autocast(device.type, DTYPES[dtype])
    with torch.no_grad(), reduced:
        yield


def distilled(student: Tensor, target: Tensor, taught: Tensor | None, share: float) -> Tensor:
    """Squared errors ``(B, C, H, W)`` against the data and, by ``share``, against a teacher.

    Args:
        taught: the teacher's prediction, where there is a share for it.
    """
    error = (student - target).square()
    if taught is None:
        return error
    return (1 - share) * error + share * (student - taught).square()
