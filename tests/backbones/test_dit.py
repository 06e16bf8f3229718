"""What we claim to know of diffusers' DiT, against diffusers' DiT."""

from __future__ import annotations

import pytest
import torch

from ditdial import FULL, Mode
from ditdial.backbones import BACKBONES, backbone_for
from ditdial.backbones.dit import DiTBackbone
from ditdial.backbones.forward import Forward
from ditdial.ops.patching import to_grouped

BACKBONE = DiTBackbone()


def test_the_class_is_found_by_its_name(model):
    assert isinstance(backbone_for(model), DiTBackbone)
    assert BACKBONES["DiTTransformer2DModel"] is DiTBackbone


def test_an_unknown_class_is_refused_and_the_nearest_named():
    class DitTransformerModel(torch.nn.Module):
        pass

    message = "'DitTransformerModel' is not supported; legal: DiTTransformer2DModel"
    with pytest.raises(ValueError, match=message):
        backbone_for(DitTransformerModel())


@pytest.mark.parametrize("sides", [(32, 24), (30, 27)])  # a stride leaves out what is over
def test_vectors_are_what_the_embedding_convolves(make_model, sides):
    model = make_model(in_channels=3)
    x = torch.randn(2, 3, *sides)
    grid = BACKBONE.grid(model, {"hidden_states": x})
    forward = Forward(grid=grid, patch=BACKBONE.patches.size(model))
    vectors = BACKBONE.vectors(x, forward)
    assert grid == (1, sides[0] // 4, sides[1] // 4) == tuple(vectors.shape[1:4])
    weight, bias = BACKBONE.patches.kernel(model)
    assert weight.shape == (32, 3, 1, 4, 4)
    found = vectors @ to_grouped(weight, (1, 1, 1), BACKBONE.patches.embed_layout).T + bias
    expected = model.pos_embed.proj(x).permute(0, 2, 3, 1)[:, None]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_output_rows_and_load_patch_are_inverse(make_model):
    model = make_model(in_channels=3, out_channels=6)
    other = make_model(in_channels=3, out_channels=6)
    with torch.no_grad():
        for parameter in (*other.pos_embed.parameters(), *other.proj_out_2.parameters()):
            parameter.zero_()
    weight, bias = BACKBONE.patches.rows(model)
    assert weight.shape == (32, 6, 1, 4, 4)
    assert bias.shape == (1, 6, 1, 4, 4)
    BACKBONE.patches.load(other, BACKBONE.patches.kernel(model), (weight, bias))
    state, expected = other.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("side", [8, 12, 5])
def test_positions_at_scale_one_are_the_stock_table(model, side):
    embed = model.pos_embed
    forward = Forward(grid=(1, side, side))
    zero = torch.zeros(1, 1, side * 4, side * 4)
    expected = embed(zero) - embed.proj.bias
    found = BACKBONE.positions(embed, forward, FULL)
    torch.testing.assert_close(found.expand_as(expected), expected, atol=1e-5, rtol=1e-5)


def test_coarse_positions_are_between_the_fine_ones(model):
    forward = Forward(grid=(1, 8, 8))
    table = BACKBONE.positions(model.pos_embed, forward, Mode(2))
    assert table.shape == (1, 16, 32)
    # Sine of the lowest frequencies is nearly linear: centre = mean of the four covered.
    fine = BACKBONE.positions(model.pos_embed, forward, FULL).reshape(4, 2, 4, 2, 32).mean((1, 3))
    slow = [6, 7, 22, 23]
    found, expected = table.reshape(4, 4, 32)[..., slow], fine[..., slow]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_low_rank_layers_are_all_linear_layers_of_attention_and_feed_forward(model):
    found = {name for name, _ in BACKBONE.low_rank_layers(model)}
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert found == {n for n in linear if ".attn1." in n or ".ff." in n}
    assert len(found) == 6 * 2


def test_branches_are_recognised_by_the_null_class(model, make_call):
    guided = BACKBONE.arguments.branches(model, make_call(3, guided=True), None)
    assert guided is not None
    assert (guided.conditional, guided.guidance) == (slice(0, 3), slice(3, 6))
    for labels in ([1, 2, 3, 4], [10, 10, 1, 2], [10, 10, 10, 10], [1, 10, 2, 10], [1, 2, 3, 10]):
        call = make_call(4) | {"class_labels": torch.tensor(labels)}
        assert BACKBONE.arguments.branches(model, call, None) is None
    assert BACKBONE.arguments.branches(model, make_call(3), None) is None
    assert BACKBONE.arguments.branches(model, make_call(2) | {"class_labels": None}, None) is None


def test_the_level_is_the_time_over_a_thousand(make_call):
    assert BACKBONE.times.levels(make_call(2, 250.0)) == (0.25, 0.25)
    assert BACKBONE.times.levels({"timestep": torch.tensor([999])}) == (0.999, 0.999)
    assert BACKBONE.times.levels({"timestep": torch.tensor([5.0, 1.0])}) == (0.001, 0.005)
    with pytest.raises(ValueError, match=r"timestep = None; .*so give one"):
        BACKBONE.times.levels({"hidden_states": torch.zeros(1)})


@pytest.mark.parametrize("scale", [9, 16, (1, 9, 1), (1, 1, 9)])
def test_a_patch_that_does_not_fit_is_refused(model, scale):
    name = Mode(scale).name
    words = f"'{name}' does not fit the 1x8x8 base grid .*legal: at most 1x8x8 base patches"
    with pytest.raises(ValueError, match=words):
        BACKBONE.check(model, {FULL, Mode(scale)})


def test_patches_that_leave_a_ragged_border_or_are_not_square_fit(model):
    BACKBONE.check(model, {FULL} | {Mode(k) for k in range(2, 9)})
    BACKBONE.check(model, {Mode((1, 2, 4)), Mode((1, 8, 1)), Mode((1, 3, 5))})


@pytest.mark.parametrize("scale", [(2, 1, 1), (2, 2, 2)])
def test_a_picture_has_no_frames_to_join(model, scale):
    with pytest.raises(ValueError, match=f"{Mode(scale).name}' joins frames; .*legal: patchK, pat"):
        BACKBONE.check(model, {FULL, Mode(2), Mode(scale)})


def test_identity_tells_bases_apart(make_model):
    base = BACKBONE.identity(make_model())
    assert base["class"] == "DiTTransformer2DModel"
    for changes in (
        {"num_layers": 3},
        {"num_attention_heads": 4},
        {"patch_size": 2},
        {"in_channels": 3, "out_channels": 1},
        {"out_channels": 2},
        {"num_embeds_ada_norm": 11},
    ):
        other = BACKBONE.identity(make_model(**changes))
        assert {k for k in base if base[k] != other[k]}, changes
