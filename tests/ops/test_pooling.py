"""Pooling of token grids and the way back: no shift of content, whatever the sides."""

from __future__ import annotations

import pytest
import torch

from ditdial.ops.pooling import (
    UPSAMPLES,
    pool_phases,
    pool_tokens,
    rotate_pairs,
    spread_tokens,
    window_middles,
)
from ditdial.ops.positions import real_rotary_centres

kinds = pytest.mark.parametrize("kind", UPSAMPLES)


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@kinds
def test_a_ramp_comes_back_without_a_mean_offset(kind):
    """The paper's ``nearest`` shifts content by up to 0.4 tokens at the sides that it uses."""
    for n in range(1, 33):
        rows = torch.arange(n).double()
        for m in range(1, n + 1):
            for dense, sparse in (((n, 3), (m, 2)), ((5, n), (4, m))):
                ramp = torch.cartesian_prod(*(torch.arange(side).double() for side in dense))[None]
                back = spread_tokens(pool_tokens(ramp, dense, sparse), sparse, dense, kind)
                assert (back - ramp).mean((0, 1)).abs().max() < 1e-12, (dense, sparse, rows)


@kinds
def test_the_same_grid_changes_nothing(kind):
    x = tokens(2, 42, 8)
    assert torch.equal(pool_tokens(x, (6, 7), (6, 7)), x)
    torch.testing.assert_close(spread_tokens(x, (6, 7), (6, 7), kind), x, atol=0, rtol=1e-15)


@kinds
def test_constants_stay(kind):
    x = torch.full((1, 35, 3), 2.5, dtype=torch.float64)
    small = pool_tokens(x, (5, 7), (3, 2))
    assert torch.equal(small, torch.full_like(small, 2.5))
    torch.testing.assert_close(spread_tokens(small, (3, 2), (5, 7), kind), x)


def test_pooling_averages_windows():
    x = tokens(2, 30, 4)
    grid = x.view(2, 5, 6, 4)
    found = pool_tokens(x, (5, 6), (2, 3)).view(2, 2, 3, 4)
    torch.testing.assert_close(found[:, 0, 1], grid[:, 0:3, 2:4].mean((1, 2)))
    torch.testing.assert_close(found[:, 1, 2], grid[:, 2:5, 4:6].mean((1, 2)))


@kinds
def test_frames_are_pooled_apart(kind):
    x = tokens(2, 3 * 20, 4)
    frames = x.view(2, 3, 20, 4)
    small = pool_tokens(x, (4, 5), (2, 2))
    wide = spread_tokens(small, (2, 2), (4, 5), kind).view(2, 3, 20, 4)
    for frame in range(3):
        own = pool_tokens(frames[:, frame], (4, 5), (2, 2))
        assert torch.equal(small.view(2, 3, 4, 4)[:, frame], own)
        assert torch.equal(wide[:, frame], spread_tokens(own, (2, 2), (4, 5), kind))


def test_half_way_tokens_are_the_mean_of_both():
    x = torch.tensor([[[0.0], [1.0]]])
    found = spread_tokens(x, (2, 1), (3, 1), "nearest-exact")
    assert found.flatten().tolist() == [0.0, 0.5, 1.0]


def test_middles_of_windows():
    assert window_middles(16, 8) == [0.5 + 2 * i for i in range(8)]
    assert window_middles(7, 3) == [1.0, 3.0, 5.0]
    for n in range(1, 20):
        for m in range(1, n + 1):
            middles = window_middles(n, m)
            mirrored = [n - 1 - x for x in reversed(middles)]
            assert middles == mirrored


def phases(positions, frequencies):
    angles = torch.outer(positions, frequencies).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def test_phases_are_those_of_the_middles():
    frequencies = torch.tensor([1.0, 0.1, 0.01])
    rows, columns = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
    along = [phases(x.flatten(), frequencies) for x in (rows, columns)]
    cos, sin = (torch.cat(pair, dim=1) for pair in zip(*along, strict=True))
    found = pool_phases(cos, sin, (7, 9), (3, 4))
    middles = torch.cartesian_prod(
        torch.tensor(window_middles(7, 3)), torch.tensor(window_middles(9, 4))
    )
    along = [phases(x, frequencies) for x in middles.T]
    for table, expected in zip(found, zip(*along, strict=True), strict=True):
        torch.testing.assert_close(table, torch.cat(expected, dim=1), atol=1e-6, rtol=0)


def test_phases_of_dividing_grids_are_those_of_groups():
    cos, sin = phases(torch.arange(24.0), torch.tensor([0.3, 0.02]))
    cos, sin = cos[:, :2].repeat(1, 2), sin[:, :2].repeat(1, 2)
    found = pool_phases(cos, sin, (4, 6), (2, 3))
    expected = real_rotary_centres(cos, sin, (1, 4, 6), (1, 2, 2))
    for table, other in zip(found, expected, strict=True):
        torch.testing.assert_close(table, other)


def test_turning_is_multiplication_of_complex_numbers():
    x, angles = tokens(2, 5, 3, 8), tokens(5, 4)
    cos, sin = (
        f(angles).repeat_interleave(2, dim=1)[None, :, None] for f in (torch.cos, torch.sin)
    )
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    ).view(1, 5, 1, 4)
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(rotate_pairs(x, cos, sin), expected, atol=1e-6, rtol=1e-6)
