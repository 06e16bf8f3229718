"""What every flow-matching loss starts from: noised pictures, their targets, dropped labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ditdial.ops.flow import network_input_and_target, stratified_levels


@dataclass(frozen=True)
class NoisyBatch:
    """Network inputs and targets of ``ditdial.ops.flow``.

    Args:
        x, target: ``(B, C, H, W)``.
        level: noise levels ``(B,)`` in [0, 1].
        labels: classes ``(B,)``, the null class where the label was dropped.
    """

    x: Tensor
    target: Tensor
    level: Tensor
    labels: Tensor

    @property
    def times(self) -> Tensor:
        """The time the network is given, in 0..1000."""
        return self.level * 1000

    def where(self, keep: Tensor) -> NoisyBatch:
        """Some of the rows."""
        return NoisyBatch(self.x[keep], self.target[keep], self.level[keep], self.labels[keep])

    def noisier_than(self, lowest: float) -> Tensor:
        """Rows at ``lowest`` or above, and at least the noisiest one: a mask ``(B,)``."""
        return self.level >= min(lowest, self.level.max().item())


class Noising(Protocol):
    """The settings of a task that say how pictures are noised and labels dropped."""

    @property
    def level_mean(self) -> float:
        """Of ``sigmoid(mean + std * normal)``, as noise levels are drawn."""
        ...

    @property
    def level_std(self) -> float:
        """Likewise."""
        ...

    @property
    def label_dropout(self) -> float:
        """Share of the labels that are replaced by the null label."""
        ...


def noisy_batch(
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    settings: Noising,
    *,
    null_label: int,
    within: tuple[float, float] = (0.0, 1.0),
) -> NoisyBatch:
    """Noise pictures ``(B, C, H, W)`` of unit variance; all randomness comes from ``generator``."""
    count = len(images)
    mean, std = settings.level_mean, settings.level_std
    level = stratified_levels(count, generator, mean=mean, std=std, within=within).to(images)
    noise = torch.randn(images.shape, generator=generator).to(images)
    dropped = (torch.rand(count, generator=generator) < settings.label_dropout).to(labels.device)
    x, target = network_input_and_target(images, noise, level[:, None, None, None])
    return NoisyBatch(x, target, level, torch.where(dropped, null_label, labels))
