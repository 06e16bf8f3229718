"""The rule that says above which noise level the low band is enough."""

from __future__ import annotations

import math

import pytest

from ditdial.plan.spectrum import FLUX_VAE, WAN_VAE, Spectrum

white = Spectrum(amplitude=0.5, exponent=0.0, side=64)


def test_it_is_the_published_formula():
    power = 203.6 * 32**-1.915
    expected = 1 / (1 + math.sqrt(0.01 / (power * (1 + power - 0.01))))
    assert FLUX_VAE.switch(128, 2) == pytest.approx(expected)
    assert FLUX_VAE.switch(128, 2) == pytest.approx(0.853, abs=0.001)


@pytest.mark.parametrize("spectrum", [FLUX_VAE, WAN_VAE])
def test_smaller_bands_and_more_care_switch_earlier_in_the_run(spectrum):
    assert spectrum.switch(128, 4) > spectrum.switch(128, 2)
    assert spectrum.switch(128, 2, missed=0.01) > spectrum.switch(128, 2, missed=0.1)


@pytest.mark.parametrize("missed", [0.01, 0.05, 0.2])
def test_at_the_switch_the_signal_has_the_share_asked_for(missed):
    """Of the latent's power at the edge of the band."""
    power = white.power(16, 64)
    noise = white.switch(64, 2, missed)
    signal = (1 - noise) ** 2 * power
    assert signal / (signal + noise**2) == pytest.approx(missed / (1 + power))


def test_nothing_above_the_band_is_never_missed():
    assert Spectrum(amplitude=1e-3, exponent=2.0, side=64).switch(64, 2) == 0.0


def test_at_another_size_a_wave_of_as_many_per_side_is_as_strong_per_number():
    assert white.power(16, 128) == 4 * white.power(16, 64)
