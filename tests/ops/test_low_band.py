"""The low band as a smaller latent, against Gaussian data whose best predictors are known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ditdial.ops.low_band import Band, band_of, enlarged, from_band, shrunk, with_band
from ditdial.ops.noising import KINDS, Scales

SIDES = [((8, 12), (4, 6)), ((9, 7), (4, 5)), ((6, 6), (6, 6)), ((5, 8), (1, 8))]
LEVELS = (1.0, 0.9, 0.5, 0.1)
CASES = [
    (kind, level)
    for kind, level in itertools.product(KINDS, LEVELS)
    if (kind, level) != ("epsilon", 1.0)  # the noise of pure noise tells nothing of the data
]


def scales_at(kind, level):
    if kind == "flow_prediction":
        return Scales(kind, 1 - level, level)
    return Scales(kind, math.cos(level * math.pi / 2), math.sin(level * math.pi / 2))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def waves(side, count):
    """Values ``(side, count)`` of cosines of the height 1, at the middles of so many places."""
    place = (torch.arange(side).double() + 0.5) / side
    return torch.cos(math.pi * place[:, None] * torch.arange(count))


def covariance(sides, count, strengths):
    """Of pictures that are sums of the same random waves at every size.

    Args:
        count: waves per axis.
        strengths: covariance of their heights, ``(rows, columns, rows, columns)``.
    """
    rows, columns = (waves(side, n) for side, n in zip(sides, count, strict=True))
    found = torch.einsum("hr,wc,rcst,gs,vt->hwgv", rows, columns, strengths, rows, columns)
    return found.reshape(math.prod(sides), math.prod(sides))


def independent(count, seed=3):
    """Strengths of waves that know nothing of each other, falling with their number."""
    rows, columns = torch.meshgrid(*map(torch.arange, count), indexing="ij")
    power = (4 / (1.0 + rows**2 + columns**2).double()) * (0.5 + normal(*count, seed=seed) ** 2)
    return torch.diag(power.flatten()).reshape(*count, *count)


def best(latent, scales, covariance):
    """The best prediction of Gaussian data, by the kind of the scales."""
    x, a, s = latent.flatten(-2), scales.signal, scales.noise
    seen = a**2 * covariance + s**2 * torch.eye(len(covariance), dtype=torch.float64)
    clean = (a * covariance @ torch.linalg.solve(seen, x.T)).T
    noise = (s * torch.linalg.solve(seen, x.T)).T
    return scales.prediction(clean, noise).view_as(latent)


def bound(scales, covariance):
    """1e-12, or what the rounding of its solve may add where the noise is small beside the data."""
    largest = torch.linalg.eigvalsh(covariance)[-1].item()
    condition = 1 + scales.signal**2 * largest / scales.noise**2
    error = max(1e-12, 4 * torch.finfo(torch.float64).eps * condition)
    return {"rtol": error, "atol": error}


def low_band_only(latent, scales, covariance, sides):
    """The best prediction that sees the band alone, and knows of nothing above it."""
    whole = latent.shape[-2:]
    every = torch.eye(math.prod(whole), dtype=torch.float64).view(-1, *whole)
    P = band_of(every, sides).flatten(1).T  # (h w, H W)
    a, s = scales.signal, scales.noise
    band = P @ latent.flatten(-2).T
    own = P @ covariance @ P.T
    seen = a**2 * own + s**2 * torch.eye(len(own), dtype=torch.float64)
    clean = (P.T @ (a * own @ torch.linalg.solve(seen, band))).T.view_as(latent)
    return scales.prediction(clean, (latent - a * clean) / s)


@pytest.mark.parametrize(("sides", "small"), SIDES)
def test_the_band_is_of_orthonormal_waves(sides, small):
    x = normal(3, *sides)
    low = from_band(band_of(x, small), sides)
    torch.testing.assert_close(from_band(band_of(low, small), sides), low)
    torch.testing.assert_close(low.square().sum(), band_of(x, small).square().sum())
    rows, columns = (waves(side, side) for side in sides)
    above = torch.einsum("bhw,hr,wc->brc", x - low, rows, columns)
    assert above[:, : small[0], : small[1]].abs().max() < 1e-12
    below = torch.einsum("bhw,hr,wc->brc", low, rows, columns)
    below[:, : small[0], : small[1]] = 0
    assert below.abs().max() < 1e-12


@pytest.mark.parametrize(("sides", "small"), SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_clean_latent_keeps_its_values(sides, small, kind):
    scales = scales_at(kind, 0.4)
    band = Band(scales.signal * torch.full((1, *sides), 3.0).double(), scales, small)
    expected = torch.full((1, *small), 3.0).double()
    torch.testing.assert_close(band.latent / band.own.signal, expected)
    torch.testing.assert_close(shrunk(torch.full((1, *sides), 3.0).double(), small), expected)
    torch.testing.assert_close(enlarged(expected, sides), torch.full((1, *sides), 3.0).double())


@pytest.mark.parametrize(("kind", "level"), CASES)
@pytest.mark.parametrize(("sides", "small"), SIDES)
def test_it_is_exact_where_the_band_is_independent_of_the_rest(sides, small, kind, level):
    """The best prediction of the small pictures, put back, is that of the large ones."""
    scales, strengths = scales_at(kind, level), independent(small)
    large, little = covariance(sides, small, strengths), covariance(small, small, strengths)
    latent = normal(4, *sides)
    band = Band(latent, scales, small)
    found = band.prediction(best(band.latent, band.own, little))
    torch.testing.assert_close(found, best(latent, scales, large), **bound(scales, large))


@pytest.mark.parametrize(("kind", "level"), CASES)
@pytest.mark.parametrize("wave", ["block-diagonal", "mixed"])
def test_it_is_the_best_that_sees_the_band_alone(kind, level, wave):
    """Also where the data has waves above the band, which are missed, or shares them with it."""
    (sides, small), count = ((8, 6), (4, 3)), (8, 6)
    strengths = independent(count)
    if wave == "mixed":
        mix = normal(math.prod(count), math.prod(count), seed=5) / 20
        own = strengths.reshape(math.prod(count), -1)
        strengths = ((mix + torch.eye(len(mix))) @ own @ (mix + torch.eye(len(mix))).T).reshape(
            *count, *count
        )
    scales, large = scales_at(kind, level), covariance(sides, count, strengths)
    low = strengths[: small[0], : small[1], : small[0], : small[1]]
    latent = normal(4, *sides)
    band = Band(latent, scales, small)
    found = band.prediction(best(band.latent, band.own, covariance(small, small, low)))
    expected = low_band_only(latent, scales, large, small)
    torch.testing.assert_close(found, expected, **bound(scales, large))


def autoregressive(side, by):
    place = torch.arange(side).double()
    return by ** (place[:, None] - place).abs()


@pytest.mark.parametrize(("by", "missed"), [(0.95, 0.0005), (0.6, 0.0708)])
def test_what_is_missed_of_pictures_whose_neighbours_are_alike(by, missed):
    """The share of the clean latent's power by which the band misses the best prediction."""
    sides, small, scales = (8, 8), (4, 4), scales_at("flow_prediction", 0.9)
    large = torch.kron(autoregressive(8, by), autoregressive(8, by))
    every = torch.eye(64, dtype=torch.float64).view(-1, *sides)
    low, right = (
        scales.clean(every, each).flatten(1).T
        for each in (low_band_only(every, scales, large, small), best(every, scales, large))
    )
    seen = scales.signal**2 * large + scales.noise**2 * torch.eye(64).double()
    gap = torch.trace((low - right) @ seen @ (low - right).T) / torch.trace(right @ seen @ right.T)
    assert gap.item() == pytest.approx(missed, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_noise_above_the_band_is_the_seeds(kind, dtype, error):
    scales, sides, small = scales_at(kind, 0.8), (8, 8), (4, 4)
    noise = normal(1, *sides, seed=1).to(dtype)
    clean = from_band(normal(1, *small).to(dtype), sides)
    latent = scales.signal * clean + scales.noise * noise
    band = Band(latent, scales, small)
    truth = band.own.prediction(band_of(clean, small) / band.ratio, band_of(noise, small))
    found = band.prediction(truth)
    assert (scales.noises(latent, found) - noise).abs().max() < error
    assert (scales.clean(latent, found) - clean).abs().max() < error


@pytest.mark.parametrize("power", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon"])
def test_what_a_whole_run_loses_above_the_band(power, kind):
    """Low until a level and exact below it: ``P (1 - (1 + q P)^-1/2)^2``, ``q = a^2 / s^2``."""
    sides, small, steps, until = (4, 4), (2, 2), 3000, 0.7
    strengths = independent(small)
    high = torch.ones(sides).double()
    high[:2, :2] = 0
    rows = waves(4, 4)
    heights = torch.diag(1 / rows.square().sum(0))  # of orthonormal waves
    ortho = (rows @ heights.sqrt())[:, None, :, None] * (rows @ heights.sqrt())[None, :, None, :]
    ortho = ortho.reshape(16, 16)
    large = (
        covariance(sides, small, strengths) + power * ortho @ torch.diag(high.flatten()) @ ortho.T
    )
    little = covariance(small, small, strengths)
    start = normal(1, *sides)
    ends = []
    for switch in (2.0, until):
        x = start.clone() * scales_at(kind, 0.999).noise
        levels = torch.linspace(0.999, 1e-4, steps + 1).double().tolist()
        for level, later in itertools.pairwise(levels):
            now, then = scales_at(kind, level), scales_at(kind, later)
            band = Band(x, now, small)
            low = level > switch if switch < 1 else False
            found = (
                band.prediction(best(band.latent, band.own, little)) if low else best(x, now, large)
            )
            x = then.signal * now.clean(x, found) + then.noise * now.noises(x, found)
        ends.append(ortho.T @ x.flatten())
    lost = (ends[0] - ends[1]).square()[high.flatten().bool()]
    at = scales_at(kind, until)
    q = (at.signal / at.noise) ** 2
    unit = (ortho.T @ start.flatten()).square()[high.flatten().bool()]
    expected = power * (1 - (1 + q * power) ** -0.5) ** 2 * unit
    torch.testing.assert_close(lost, expected, rtol=0.03, atol=1e-5)


def test_one_low_branch_under_strong_guidance_keeps_the_other_ones_high_band():
    """Left alone, carried noise would be multiplied by the guidance scale."""
    sides, small, scale = (8, 8), (4, 4), 7.5
    scales, latent = scales_at("flow_prediction", 0.6), normal(1, 8, 8)
    full = best(latent, scales, covariance(sides, sides, independent(sides)))
    low = Band(latent, scales, small).prediction(normal(1, *small))
    mixed = with_band(full, low, small)
    torch.testing.assert_close(band_of(mixed, small), band_of(low, small))
    guided = mixed + scale * (full - mixed)
    above = guided - from_band(band_of(guided, small), sides)
    torch.testing.assert_close(above, full - from_band(band_of(full, small), sides))
    blown = low + scale * (full - low)
    blown = blown - from_band(band_of(blown, small), sides)
    assert blown.norm() > 2 * above.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_says_what_was_joined(kind):
    scales, clean, noise = scales_at(kind, 0.6), normal(2, 3), normal(2, 3, seed=1)
    latent = scales.signal * clean + scales.noise * noise
    prediction = scales.prediction(clean, noise)
    torch.testing.assert_close(scales.clean(latent, prediction), clean)
    torch.testing.assert_close(scales.noises(latent, prediction), noise)


def test_the_time_of_the_band_is_that_of_the_resolution_shift():
    """Stable Diffusion 3 (2403.03206, section 5.3.2), read backwards: from many tokens to few."""
    for level in (0.2, 0.5, 0.9):
        own, _ = scales_at("flow_prediction", level).with_signal(2.0)
        assert 2.0 * own.noise / (1 + (2.0 - 1) * own.noise) == pytest.approx(level)


def test_sixteen_bits_are_computed_in_thirty_two():
    latent = normal(1, 16, 16).bfloat16()
    scales = Scales("flow_prediction", 0.3, 0.7)
    found, exact = Band(latent, scales, (8, 8)), Band(latent.double(), scales, (8, 8))
    assert found.latent.dtype == torch.float32
    torch.testing.assert_close(found.latent.double(), exact.latent, rtol=1e-5, atol=1e-6)
    small = exact.latent.bfloat16()
    one, other = (each.prediction(small) for each in (found, exact))
    assert one.dtype == torch.float32
    torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("small", [(0, 4), (9, 4), (4, 13)])
def test_sides_out_of_range_are_refused(small):
    with pytest.raises(ValueError, match=r"sides = .*; legal: from \(1, 1\) to \(8, 12\)"):
        Band(normal(1, 8, 12), Scales("epsilon", 0.6, 0.8), small)


def test_a_latent_without_noise_and_an_unknown_kind_are_refused():
    with pytest.raises(ValueError, match=r"noise = 0\.0; legal: > 0"):
        Band(normal(1, 8, 12), Scales("epsilon", 1.0, 0.0), (4, 4))
    with pytest.raises(ValueError, match="kind = 'noise'; legal: flow_prediction"):
        Scales("noise", 0.5, 0.5)
