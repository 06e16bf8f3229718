"""Merged weights live as long as nothing they were made of has changed, and no longer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from ditdial import Mode
from ditdial.layers.low_rank import MERGED
from ditdial.layers.merged_weights import fingerprints

WEAK = Mode(2)
CPU = torch.device("cpu")


@pytest.fixture
def pair(make_elastic):
    """The same elastic model without merged weights and with them."""
    return make_elastic(), make_elastic(merge=True)


def layer_of(handle) -> nn.Linear:
    return handle.model.transformer_blocks[0].attn1.to_q


def copy_of(handle) -> torch.Tensor:
    return layer_of(handle).__dict__[MERGED][WEAK.name][1]


@torch.no_grad()
def run(handle, call):
    with handle.using(WEAK):
        return handle.model(**call).sample


def assert_alike(pair, call):
    plain, merged = (run(handle, call) for handle in pair)
    torch.testing.assert_close(merged, plain, atol=1e-5, rtol=1e-5)


def test_copies_outlive_a_run(pair, make_call):
    run(pair[1], make_call())
    first = copy_of(pair[1])
    assert_alike(pair, make_call(3))
    assert copy_of(pair[1]) is first


def test_a_change_without_a_trace_in_the_version_is_seen_by_the_next_run(pair, make_call):
    call = make_call()
    run(pair[1], call)
    first = copy_of(pair[1])
    for handle in pair:
        weight = layer_of(handle).weight
        version = weight._version
        weight.data.mul_(1.5)
        assert weight._version == version
    assert_alike(pair, call)
    assert copy_of(pair[1]) is not first


def test_they_are_made_again_after_a_model_was_stock_for_a_while(pair, make_call, tmp_path):
    call = make_call()
    run(pair[1], call)
    pair[1].model.save_pretrained(tmp_path)
    assert MERGED not in layer_of(pair[1]).__dict__
    assert_alike(pair, call)
    assert MERGED in layer_of(pair[1]).__dict__


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("already", [False, True])
def test_a_parametrized_weight_keeps_its_update_apart(pair, make_call, already):
    call = make_call()
    if already:
        run(pair[1], call)
    for handle in pair:
        parametrize.register_parametrization(layer_of(handle), "weight", Halved())
    with pytest.warns(
        UserWarning,
        match="1 of 12 .* unmerged: 1 with a parametrised weight",
    ):
        run(pair[1], call)
    for _ in range(2):
        assert_alike(pair, call)
        for handle in pair:
            with torch.no_grad():
                layer_of(handle).parametrizations.weight.original.mul_(1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_fingerprint_changes_with_one_bit(dtype):
    weight = torch.randn(6, 4).to(dtype)
    before = fingerprints([weight, weight.clone()], CPU)
    assert before[0] == before[1]
    weight.view(torch.uint8)[3, 2] ^= 1
    after = fingerprints([weight], CPU)
    assert after[0] != before[0]


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(3, 5).bfloat16(),  # half a word is left over
        torch.randn(4, 4).T[:, ::2],
        torch.randn(4, 4, device="meta"),
        torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
    ],
    ids=["odd", "strided", "elsewhere", "eight bits"],
)
def test_what_cannot_be_read_is_like_nothing_else(weight):
    assert fingerprints([weight], CPU) != fingerprints([weight], CPU)
    known, unknown = fingerprints([torch.ones(2, 2), weight], CPU)
    assert isinstance(known, int)
    assert not isinstance(unknown, int)
