"""Positions: diffusers' own table at whole positions; centres of groups."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from ditdial.ops.positions import (
    group_centres,
    rotary_centres,
    sincos_1d,
    sincos_2d,
    table_centres,
)


@pytest.mark.parametrize(("side", "base"), [(8, 8), (8, 4), (6, 8)])
def test_table_equals_diffusers(side, base):
    expected = get_2d_sincos_pos_embed(32, side, base_size=base, output_type="pt")
    positions = torch.arange(side, dtype=torch.float64) * base / side
    found = sincos_2d(positions, positions, 32)
    torch.testing.assert_close(found.float(), expected.float(), atol=1e-6, rtol=1e-6)


def test_rows_and_columns_are_not_swapped():
    rows, columns = torch.tensor([3.0]), torch.tensor([0.0, 1.0, 2.0])
    table = sincos_2d(rows, columns, 16)
    torch.testing.assert_close(table[:, :8], sincos_1d(columns, 8))
    torch.testing.assert_close(table[:, 8:], sincos_1d(rows.expand(3), 8))


def test_centres_are_the_means_of_the_positions_they_cover():
    for length, k in ((8, 1), (8, 2), (8, 4), (9, 3)):
        expected = torch.arange(length, dtype=torch.float64).reshape(-1, k).mean(1)
        assert torch.equal(group_centres(length, k), expected)


def test_a_ragged_border_keeps_the_spacing():
    assert group_centres(7, 2).tolist() == [0.5, 2.5, 4.5, 6.5]
    assert group_centres(1, 4).tolist() == [1.5]


FREQUENCIES = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)  # the fastest is 1 per token


def phases(frames, rows, columns):
    """Rotary phases ``(T, H, W, X)`` whose features are divided among the three axes."""
    shape = len(frames), len(rows), len(columns), len(FREQUENCIES)
    angles = [torch.outer(positions, FREQUENCIES) for positions in (frames, rows, columns)]
    each = [angles[0][:, None, None], angles[1][None, :, None], angles[2][None, None, :]]
    angle = torch.cat([x.expand(shape) for x in each], dim=-1)
    return torch.polar(torch.ones_like(angle), angle)


def whole(length):
    return torch.arange(length, dtype=torch.float64)


@pytest.mark.parametrize(
    "scale",
    [(1, k, k) for k in (2, 3, 4, 8)]
    + [(k, 1, 1) for k in (2, 3, 4, 8)]
    + [(2, 3, 4), (8, 1, 3), (1, 8, 2)],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.complex128, 1e-12), (torch.complex64, 1e-5)]
)
def test_rotary_centres_are_the_phases_at_fractional_positions(scale, dtype, tolerance):
    found = rotary_centres(phases(*[whole(24)] * 3).to(dtype), scale)
    expected = phases(*[group_centres(24, k) for k in scale]).to(dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("scale", [(1, 2, 3), (2, 4, 2), (2, 2, 8)])
def test_rotary_centres_of_features_that_turn_along_every_axis(scale):
    """One phase per axis, multiplied: what an axis adds to the length cancels."""
    frames, rows, columns = phases(*[whole(8 * k) for k in scale]).split(len(FREQUENCIES), dim=-1)
    found = rotary_centres(frames * rows * columns, scale)
    frames, rows, columns = phases(*[group_centres(8 * k, k) for k in scale]).split(
        len(FREQUENCIES), dim=-1
    )
    torch.testing.assert_close(found, frames * rows * columns, atol=1e-12, rtol=0)


def test_rotary_centres_at_scale_one_change_no_bit():
    table = phases(whole(3), whole(4), whole(5)).to(torch.complex64)
    assert torch.equal(rotary_centres(table, (1, 1, 1)), table)


@pytest.mark.parametrize("scale", [(1, 1), (2, 2), (3, 3), (4, 4), (2, 1), (3, 4)])
def test_table_centres_of_a_linear_table_are_exact(scale):
    rows, columns = whole(12), whole(24)
    table = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    found = table_centres(table, scale)
    centres = [group_centres(n, k) for n, k in zip((12, 24), scale, strict=True)]
    assert torch.equal(found, torch.cartesian_prod(*centres))


def test_table_centres_take_the_two_tokens_next_to_the_centre():
    table = torch.randn(8, 9, 5)
    found = table_centres(table, (4, 3)).reshape(2, 3, 5)
    expected = (table[[1, 5]] + table[[2, 6]])[:, [1, 4, 7]] / 2
    torch.testing.assert_close(found, expected)
    assert torch.equal(table_centres(table, (1, 1)), table.flatten(0, 1))


def test_table_centres_continue_a_ragged_border_by_its_last_row_and_column():
    table = torch.randn(5, 7, 3)
    for scale in ((2, 2), (3, 4), (4, 5), (2, 1), (5, 7), (3, 3)):
        h, w = (-(-n // k) * k for n, k in zip((5, 7), scale, strict=True))
        rows, columns = torch.arange(h).clamp(max=4), torch.arange(w).clamp(max=6)
        torch.testing.assert_close(
            table_centres(table, scale), table_centres(table[rows][:, columns], scale)
        )
        assert len(table_centres(table, scale)) == (h // scale[0]) * (w // scale[1])
