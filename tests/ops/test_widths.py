"""Slots of heads and channels, and which come first."""

from __future__ import annotations

import pytest
import torch

from ditdial.ops.widths import (
    by_importance,
    channel_importance,
    features_of,
    head_importance,
    shared_out,
    slot_of_features,
)


def test_the_largest_head_comes_first():
    rows, columns = torch.ones(6, 4), torch.ones(4, 6)
    rows[2:4] *= 3  # the second of three heads
    rows[4:] *= 2
    order = by_importance(head_importance([rows, rows], [columns], 3))
    assert order.tolist() == [1, 2, 0]


def test_channels_by_the_product_of_their_norms():
    rows, columns = torch.ones(4, 3), torch.ones(3, 4)
    rows[2], columns[:, 0] = 0.0, 5.0
    order = by_importance(channel_importance(rows, columns))
    assert order[0] == 0
    assert order[-1] == 2


def test_gating_rows_count_too():
    rows = torch.ones(8, 3)  # four channels, and what gates them
    rows[4 + 3] = 7.0
    assert by_importance(channel_importance(rows, torch.ones(3, 4)))[0] == 3


def test_equal_importance_keeps_the_order():
    assert by_importance(torch.ones(5)).tolist() == [0, 1, 2, 3, 4]


def test_features_of_open_slots():
    slots = slot_of_features(torch.tensor([3, 1, 0, 2]), 2)  # units 3 and 1 in slot 0
    assert slots.tolist() == [1, 0, 1, 0]
    assert features_of(torch.tensor([True, False]), slots).tolist() == [1, 3]
    assert features_of(torch.tensor([True, True]), slots).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("mean", [0.01, 0.3, 0.6, 0.9, 1.0])
def test_shares_keep_their_proportions(mean):
    shares = [1.0, 0.33, 0.0, 0.86, 0.28]
    found = shared_out(shares, mean)
    assert sum(found) / 5 == pytest.approx(mean)
    assert all(0 < share <= 1 for share in found)
    factor = max(new / max(old, 1e-3) for new, old in zip(found, shares, strict=True))
    assert found == pytest.approx([min(1.0, factor * max(share, 1e-3)) for share in shares])


def test_equal_shares_stay_equal():
    assert shared_out([1.0] * 4, 0.5) == [0.5] * 4
