"""When the low band is enough: a rule from the power spectrum of clean latents.

A latent of side N has the power ``A w^-b`` at w waves per side (SPEED, 2605.18736, which fits A and
b to latents of one side N0; at another, a wave of as many per side is as strong per number: ``A (N
/ N0)^2 w^-b``). At a noise level the band below w is worth making alone while what is above it is
drowned: while of the latent's power at w waves, P being that of the clean latent there, the clean
signal has at most ``d / (1 + P)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CAREFUL = 0.01
"""The d of the rule; its authors use up to 0.2."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Power ``A w^-b`` of clean latents at w waves per side, where white noise has 1.

    Args:
        amplitude: A.
        exponent: b.
        side: N0, latent rows or columns of the pictures that it was fitted to.
    """

    amplitude: float
    exponent: float
    side: float

    def power(self, waves: float, side: float) -> float:
        """At so many waves per side, of latents of a side."""
        return self.amplitude * (side / self.side) ** 2 * waves**-self.exponent

    def switch(self, side: float, ratio: float, missed: float = CAREFUL) -> float:
        """The noise level (flow's s in [0, 1]) above which the low band is enough.

        Args:
            side: latent rows or columns.
            ratio: of the side to that of the band.
            missed: d.
        """
        power = self.power(side / (2 * ratio), side)
        if power <= missed:
            return 0.0
        return 1 / (1 + math.sqrt(missed / (power * (1 + power - missed))))


FLUX_VAE = Spectrum(amplitude=203.6, exponent=1.915, side=128)
"""FLUX.1 at 1024 x 1024 pixels, eight of them to a latent row (fit of 2605.18736). Other VAEs of
pictures are taken to be like it, until a calibration says what the model itself loses."""

WAN_VAE = Spectrum(amplitude=219.5, exponent=2.423, side=79)
"""Wan 2.1 at 480 x 832 pixels, 60 x 104 latent rows and columns, the root of whose product it is
taken to be fitted at (2605.18736 does not say). HunyuanVideo's videos are taken to be like it."""
