"""What a token takes in linear layers."""

from __future__ import annotations

from torch import nn

from ditdial.cost.linears import Linear, linear_macs, matrix_sizes


def test_products_and_sums_of_a_layer_that_narrows_in_parts():
    """One layer may take heads and channels, as in FLUX's single blocks."""
    layer = Linear({"heads": 3, "channels": 5}, {"nothing": 7})
    assert layer.products() == {"heads": 21, "channels": 35}
    assert layer.sums() == {"heads": 3, "channels": 5, "nothing": 7}
    rows = Linear({"nothing": 3}, {"channels": 7})
    assert rows.products() == {"channels": 21}
    assert rows.sums() == {"nothing": 3, "channels": 7}


def test_a_rank_times_the_sums_is_what_a_low_rank_update_multiplies():
    layer, rank = Linear({"heads": 3, "channels": 5}, {"nothing": 7}), 2
    down, up = Linear({"nothing": 8}, {"nothing": rank}), Linear({"nothing": rank}, {"nothing": 7})
    added = down.products().total() + up.products().total()
    assert rank * layer.sums().total() == added


def test_layers_are_found_by_name():
    model = nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 5, bias=False))
    assert linear_macs(model) == 6 + 15
    assert linear_macs(model, r"^2$") == 15
    assert linear_macs(model[0]) == 6
    assert matrix_sizes(model[2]) == (3, 5)
    assert matrix_sizes(nn.Conv3d(4, 6, (1, 2, 2))) == (16, 6)
