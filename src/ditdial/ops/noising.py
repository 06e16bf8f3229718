"""How a latent is made of clean signal and noise, and what a prediction says about the two.

With clean signal scale ``a`` and noise scale ``s`` a latent is ``x = a x0 + s e``. Flow matching
has ``a + s = 1`` and predicts ``e - x0``; variance-preserving models have ``a^2 + s^2 = 1`` and
predict the noise ``e``, the velocity ``a e - s x0``, or the clean latent itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

KINDS = ("flow_prediction", "epsilon", "v_prediction", "sample")

LEAST_SIGNAL = 1e-4
"""To divide by; variance-preserving models have 6e-3 at pure noise."""


@dataclass(frozen=True)
class Scales:
    """Of the latents of one noise level.

    Args:
        kind: what the model predicts; one of `KINDS`.
        signal, noise: ``a`` and ``s``.

    Raises:
        ValueError: another kind.
    """

    kind: str
    signal: float
    noise: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r}; legal: {', '.join(KINDS)}")

    @property
    def is_flow(self) -> bool:
        """Whether the two scales sum up to 1, not their squares."""
        return self.kind == "flow_prediction"

    def with_signal(self, factor: float) -> tuple[Scales, float]:
        """Those of a latent whose clean signal is as many times stronger.

        Returns:
            The scales, and the number that such a latent is divided by so that they are those of
            the model's path.
        """
        signal = self.signal * factor
        gain = signal + self.noise if self.is_flow else math.hypot(signal, self.noise)
        return Scales(self.kind, signal / gain, self.noise / gain), gain

    def clean(self, latent: Tensor, prediction: Tensor) -> Tensor:
        """The clean latent that a prediction implies, of the latent's shape."""
        a, s = self.signal, self.noise
        if self.is_flow:
            return latent - s * prediction
        if self.kind == "v_prediction":
            return a * latent - s * prediction
        if self.kind == "sample":
            return prediction
        return (latent - s * prediction) / max(a, LEAST_SIGNAL)

    def noises(self, latent: Tensor, prediction: Tensor) -> Tensor:
        """The noise that a prediction implies, of the latent's shape; there must be some."""
        a, s = self.signal, self.noise
        if self.is_flow:
            return latent + a * prediction
        if self.kind == "v_prediction":
            return s * latent + a * prediction
        return (latent - a * prediction) / s if self.kind == "sample" else prediction

    def prediction(self, clean: Tensor, noise: Tensor) -> Tensor:
        """The prediction that implies this clean latent and this noise."""
        if self.is_flow:
            return noise - clean
        if self.kind == "v_prediction":
            return self.signal * noise - self.noise * clean
        return clean if self.kind == "sample" else noise
