"""Derivatives of trajectories, and the spread inside blocks."""

from __future__ import annotations

import itertools

import pytest
import torch

from ditdial.ops.differences import block_spread, derivative, roughness

EVEN = [1.0, 0.75, 0.5, 0.25]
UNEVEN = [1.0, 0.93, 0.5, 0.41]
both = pytest.mark.parametrize("points", [EVEN, UNEVEN], ids=["even", "uneven"])


def trajectory(power, points, factor=1.0):
    return [factor * torch.full((2, 3), s, dtype=torch.float64) ** power for s in points]


@both
@pytest.mark.parametrize("power", [0, 1, 2])
def test_third_derivative_of_a_quadratic_is_zero(points, power):
    found = derivative(trajectory(power, points, 5.0), points)
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-11, rtol=0)


@both
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_third_derivative_of_a_cubic_is_exact(points, factor):
    found = derivative(trajectory(3, points, factor), points)
    torch.testing.assert_close(found, torch.full_like(found, 6 * factor))


def test_on_even_steps_it_is_the_third_difference_over_the_step_cubed():
    """z0 - 3 z1 + 3 z2 - z3, newest first; a sum that is zero for any latents would not pass."""
    z = list(torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    oldest_first = [z[3], z[2], z[1], z[0]]
    expected = (z[0] - 3 * z[1] + 3 * z[2] - z[3]) / (-0.25) ** 3
    assert expected.abs().max() > 0
    torch.testing.assert_close(derivative(oldest_first, EVEN), expected)


@pytest.mark.parametrize("steps", [10, 25, 100])
def test_a_smooth_trajectory_has_the_same_derivative_at_any_step_count(steps):
    points = [0.5 + (1.5 - i) / steps for i in range(4)]
    values = [torch.tensor(2.0 * s, dtype=torch.float64).sin() for s in points]
    exact = -8 * torch.tensor(1.0, dtype=torch.float64).cos()
    torch.testing.assert_close(derivative(values, points), exact, rtol=0.03, atol=0)


def test_order_of_the_points_does_not_matter():
    values = [torch.randn(3, dtype=torch.float64) for _ in UNEVEN]
    expected = derivative(values, UNEVEN)
    for order in itertools.permutations(range(4)):
        found = derivative([values[i] for i in order], [UNEVEN[i] for i in order])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("count", "points"), [(1, [1.0]), (3, [1.0, 0.5]), (3, [1.0, 0.5, 0.5])], ids=str
)
def test_bad_points_are_named(count, points):
    with pytest.raises(ValueError, match="legal"):
        derivative([torch.zeros(2)] * count, points)


def test_spread_inside_blocks_only():
    """Blocks that differ from each other but are flat inside have no spread; a ramp has some."""
    x = torch.zeros(1, 1, 4, 4, 2, 3)
    x[0, 0, :2, :2], x[0, 0, 2:, 2:] = 7.0, -3.0
    assert block_spread(x, (1, 2, 2)).shape == (1, 4)
    assert torch.equal(block_spread(x, (1, 2, 2)), torch.zeros(1, 4))
    assert (block_spread(x, (1, 4, 4)) > 1).all()


def test_spread_is_the_mean_of_the_channels_deviations():
    x = torch.randn(3, 2, 4, 6, 5, 4)
    block = x[1, :, :2, 2:4]  # (T, 2, 2, C, p)
    expected = block.transpose(0, 3).flatten(1).std(dim=1, correction=0).mean()
    found = block_spread(x, (2, 2, 2))
    assert found.shape == (3, 1 * 2 * 3)
    torch.testing.assert_close(found[1, 1], expected)


def test_cut_blocks_are_left_out():
    x = torch.zeros(1, 1, 5, 5, 1, 1)
    x[0, 0, 4], x[0, 0, :, 4] = 100.0, 100.0
    assert torch.equal(block_spread(x, (1, 2, 2)), torch.zeros(1, 4))


def test_pictures_do_not_mix_and_a_flat_background_does_not_hide_texture():
    x = torch.zeros(2, 1, 8, 8, 1, 1)
    x[1, 0, :, :4] = torch.randn(8, 4, 1, 1)
    found = roughness(x, (1, 2, 2), 0.4)
    assert found[0] == 0
    assert roughness(x, (1, 2, 2), 0.75)[1] > 0.3
    alone = torch.cat([roughness(x[i : i + 1], (1, 2, 2), 0.75) for i in range(2)])
    assert torch.equal(alone, roughness(x, (1, 2, 2), 0.75))
