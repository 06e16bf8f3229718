"""Positions: diffusers' own table at whole positions; centres of groups."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from elastic_dit.ops.positions import group_centres, sincos_1d, sincos_2d


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
