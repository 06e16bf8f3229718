"""A noisy latent's low band is a latent of the same model at a smaller size and another time.

A latent is ``x = a x0 + s e`` (`ditdial.ops.noising`). ``C`` is the orthonormal cosine transform
(DCT-II) over height and width, ``L`` its low ``h x w`` corner of ``H x W``. White noise is white in
the band. A clean latent at the smaller size has the same values, and so ``1 / r`` of the band's
coefficients, ``r = sqrt(H W / (h w))``. Hence

    y = C' L C x / g,    g = norm of (a r, s),    y = a' y0 + s' e',    a' / s' = r a / s

is a latent that a model which knows the smaller size can be given: for rectified flow ``g = a r +
s``, and for variance-preserving models ``g = sqrt((a r)^2 + s^2)``. What the model says of ``y0``
and ``e'`` is put back into the band; above it the clean latent is taken to be zero, so that all
there is noise, carried along and never drawn again.

No transform of the whole latent is needed: ``B = C' L C`` is one small matrix for each axis, and
what is above the band is ``x - B' B x``.

Shape legend: latents are ``(..., H, W)``, smaller ones ``(..., h, w)``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ditdial.ops.noising import Scales

Sides = tuple[int, int]


@dataclass(frozen=True)
class Band:
    """The low band of noisy latents, as latents of a smaller size.

    Args:
        whole: the latents ``(..., H, W)``.
        scales: what they are made of.
        sides: ``(h, w)``.

    Attributes:
        latent: what the model is given at the smaller size, ``(..., h, w)``; at least in single
            precision, since sixteen bits leave an error as large as a step of the run.
        own: what that is made of.

    Raises:
        ValueError: sides below 1 or above those of the latent, or no noise.
    """

    whole: Tensor
    scales: Scales
    sides: Sides

    def __post_init__(self) -> None:
        most = (self.whole.shape[-2], self.whole.shape[-1])
        if not all(1 <= few <= many for few, many in zip(self.sides, most, strict=True)):
            raise ValueError(f"sides = {self.sides}; legal: from (1, 1) to {most}")
        if not self.scales.noise > 0:
            raise ValueError(f"noise = {self.scales.noise}; legal: > 0")

    @property
    def ratio(self) -> float:
        """``r``: a constant clean latent keeps its values with this one alone."""
        return ratio_of((self.whole.shape[-2], self.whole.shape[-1]), self.sides)

    @functools.cached_property
    def own(self) -> Scales:
        """What the smaller latent is made of."""
        return self.scales.with_signal(self.ratio)[0]

    @functools.cached_property
    def latent(self) -> Tensor:
        """What the model is given at the smaller size."""
        return band_of(_exact(self.whole), self.sides) / self.scales.with_signal(self.ratio)[1]

    def prediction(self, small: Tensor) -> Tensor:
        """What a prediction at the smaller size says of the whole latents.

        Args:
            small: of `latent`, ``(..., h, w)``.

        Returns:
            ``(..., H, W)``, at least in single precision.
        """
        x, s, small = _exact(self.whole), self.scales.noise, _exact(small)
        clean, noise = (f(self.latent, small) for f in (self.own.clean, self.own.noises))
        gain = self.scales.with_signal(self.ratio)[1]
        # All is noise but for the band, where the model says what of it is.
        known = self.scales.prediction(
            self.ratio * clean, noise - self.latent.to(noise) * (gain / s)
        )
        rest = self.scales.prediction(torch.zeros_like(x), x / s)
        return rest + from_band(known, (x.shape[-2], x.shape[-1]))


def ratio_of(sides: Sides, small: Sides) -> float:
    """``r = sqrt(H W / (h w))``, how many times shorter its axes are, in the mean."""
    return math.sqrt(math.prod(sides) / math.prod(small))


def band_of(x: Tensor, sides: Sides) -> Tensor:
    """``(..., H, W) -> (..., h, w)``: the low band; white noise stays white."""
    rows, columns = _both(x, (x.shape[-2], x.shape[-1]), sides)
    return rows @ x @ columns.T


def from_band(x: Tensor, sides: Sides) -> Tensor:
    """``(..., h, w) -> (..., H, W)``: with nothing above the band; the transpose of `band_of`."""
    rows, columns = _both(x, sides, (x.shape[-2], x.shape[-1]))
    return rows.T @ x @ columns


def shrunk(x: Tensor, sides: Sides) -> Tensor:
    """Something without noise at a smaller size, ``(..., H, W) -> (..., h, w)``, in its dtype."""
    ratio = ratio_of((x.shape[-2], x.shape[-1]), sides)
    return (band_of(_exact(x), sides) / ratio).to(x.dtype)


def enlarged(x: Tensor, sides: Sides) -> Tensor:
    """Something without noise at a larger size, ``(..., h, w) -> (..., H, W)``, in its dtype."""
    ratio = ratio_of(sides, (x.shape[-2], x.shape[-1]))
    return (from_band(_exact(x), sides) * ratio).to(x.dtype)


def with_band(x: Tensor, other: Tensor, sides: Sides) -> Tensor:
    """``x`` with the low band of another one, both ``(..., H, W)``, in the dtype of ``x``."""
    whole = (x.shape[-2], x.shape[-1])
    difference = band_of(_exact(other) - _exact(x), sides)
    return (_exact(x) + from_band(difference, whole)).to(x.dtype)


def _both(x: Tensor, sides: Sides, small: Sides) -> tuple[Tensor, Tensor]:
    rows, columns = (
        _matrix(many, few, x.dtype, x.device) for many, few in zip(sides, small, strict=True)
    )
    return rows, columns


@functools.lru_cache(maxsize=64)
def _matrix(side: int, small: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(small, side)``: the low waves of an axis, written as so many numbers."""
    with torch.inference_mode(False):  # it may be trained with later
        return (_waves(small).T @ _waves(side)[:small]).to(device, dtype)


def _waves(side: int) -> Tensor:
    """Orthonormal cosine waves ``(side, side)``, a row each, in double precision."""
    place = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(math.pi / side * place[:, None] * (place + 0.5))
    waves[0] *= math.sqrt(0.5)
    return waves * math.sqrt(2 / side)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
