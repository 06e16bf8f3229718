"""FlexiDiT: how the new sizes start, and what each recipe leaves of the base."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ditdial import FULL, FlexiDiT, Mode, elastify
from ditdial.backbones.dit import DiTBackbone
from ditdial.backbones.forward import Forward
from ditdial.methods import METHODS, method_from_config
from ditdial.methods.flexidit import SharedPatches
from ditdial.ops.patching import coarse_grid, resize_embedding, resize_output
from ditdial.runtime.tensors import is_new

BACKBONE = DiTBackbone()
both_recipes = pytest.mark.parametrize("recipe", ["lora", "shared"])
both_kinds = pytest.mark.parametrize("kind", ["pinv", "box"])
SCALES = (2, 4, 8, (1, 2, 4), (1, 8, 1))
COARSE = tuple(Mode(k) for k in SCALES)
GRID, BASE = (1, 8, 8), (1, 4, 4)


def fresh(model, recipe, kind="pinv", scales=SCALES):
    return FlexiDiT(recipe=recipe, resize=kind, scales=scales, rank=4).build(model, BACKBONE)


def count(mode):
    return math.prod(coarse_grid(GRID, mode.patch_scale))


@both_recipes
@both_kinds
def test_a_constant_picture_gives_the_bases_tokens_at_every_size(model, recipe, kind):
    sizes = fresh(model, recipe, kind)
    x = torch.full((1, 1, 32, 32), 1.7)
    forward = Forward(grid=GRID, patch=BASE)
    vectors = BACKBONE.vectors(x, forward)
    base = model.pos_embed.proj(x).flatten(2).transpose(1, 2)
    for mode in COARSE:
        tokens = sizes.embed(vectors, mode)
        assert tokens.shape == (1, 64 // math.prod(mode.patch_scale), 32)
        expected = base[:, : tokens.shape[1]]
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


@both_recipes
@both_kinds
def test_a_constant_output_stays_constant_at_every_size(model, recipe, kind):
    # Output rows that do not depend on the pixel: the picture of equal tokens is constant.
    with torch.no_grad():
        for parameter in model.proj_out_2.parameters():
            parameter.copy_(parameter.mean(0, keepdim=True).expand_as(parameter))
    sizes = fresh(model, recipe, kind)
    token = torch.randn(32)
    expected = model.proj_out_2(token)[0]
    for mode in COARSE:
        hidden = token.expand(1, count(mode), 32)
        found = sizes.project(hidden, mode, GRID)
        assert found.shape == (1, 64, 16)
        torch.testing.assert_close(found, expected.expand_as(found), atol=1e-5, rtol=1e-5)


@both_recipes
@both_kinds
def test_mean_of_every_coarse_output_patch_is_the_bases(model, recipe, kind):
    sizes, token = fresh(model, recipe, kind), torch.randn(32)
    expected = model.proj_out_2(token).mean()
    for mode in COARSE:
        hidden = token.expand(1, count(mode), 32)
        found = sizes.project(hidden, mode, GRID).mean()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@both_kinds
@pytest.mark.parametrize("underlying", [1, 2, 4])
def test_shared_underlying_weights_give_back_the_base_exactly(model, kind, underlying):
    method = FlexiDiT(recipe="shared", resize=kind, underlying=underlying)
    sizes = method.build(model, BACKBONE)
    assert isinstance(sizes, SharedPatches)
    kernel, bias = BACKBONE.patches.kernel(model)
    rows, row_bias = BACKBONE.patches.rows(model)
    assert torch.equal(resize_embedding(sizes.flex_embed, BASE, kind), kernel)
    assert torch.equal(sizes.flex_bias, bias)
    assert torch.equal(resize_output(sizes.flex_out, BASE, kind), rows)
    assert torch.equal(resize_output(sizes.flex_out_bias, BASE, kind), row_bias)


def test_shared_write_base_changes_nothing_at_the_start(make_model):
    model, stock = make_model(), make_model()
    sizes = fresh(model, "shared")
    sizes.write_base(model, BACKBONE)
    state, expected = model.state_dict(), stock.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("side", [32, 48, 20])
def test_shared_full_mode_through_the_coarse_path_is_the_stock_model(
    make_model, make_elastic, make_call, output, side
):
    """The k = 1 case of grouping, embedding, positions, projection and ungrouping."""
    call = make_call(3, side=side)
    expected = output(make_model(), call)
    handle = make_elastic(recipe="shared")
    handle._engine.wiring.new.live = True
    for forced in (False, True):
        if forced:
            with handle.using(FULL):
                found = output(handle.model, call)
        else:
            found = output(handle.model, call)
        assert (found - expected).norm() < 1e-6 * expected.norm()
    handle._engine.wiring.new.live = False
    assert torch.equal(output(handle.model, call), expected)


def test_shared_live_path_follows_the_underlying_weights(make_elastic, make_call, output, perturb):
    handle, call = make_elastic(recipe="shared"), make_call()
    sizes = handle._engine.wiring.new
    before = output(handle.model, call)
    with handle.using(Mode(2)):
        coarse_before = output(handle.model, call)
    perturb(sizes, lambda name: name.startswith("flex_"), seed=5)
    assert torch.equal(output(handle.model, call), before)  # the stock path is materialised
    with handle.using(Mode(2)):
        assert not torch.allclose(output(handle.model, call), coarse_before)  # no stale cache
    sizes.live = True
    live = output(handle.model, call)
    sizes.write_base(handle.model, BACKBONE)
    sizes.live = False
    written = output(handle.model, call)
    assert not torch.allclose(live, before)
    assert (written - live).norm() < 1e-6 * live.norm()


def test_live_gradients_reach_the_underlying_weights(make_elastic, make_call):
    handle, call = make_elastic(recipe="shared"), make_call()
    handle._engine.wiring.new.live = True
    for mode in (FULL, Mode(2)):
        handle.model.zero_grad()
        with handle.using(mode):
            handle.model(**call).sample.square().mean().backward()
        for name in ("flex_embed", "flex_bias", "flex_out", "flex_out_bias"):
            assert getattr(handle._engine.wiring.new, name).grad.abs().max() > 0


def test_lora_gradients_reach_all_new_tensors_of_the_mode_and_no_other(make_elastic, make_call):
    handle, call = make_elastic(), make_call()
    with handle.using(Mode(2)):
        handle.model(**call).sample.square().mean().backward()
    new = {n: p for n, p in handle.model.named_parameters() if is_new(n)}
    reached = {n for n, p in new.items() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {n for n in new if "patch2" in n}


def test_a_fresh_low_rank_update_is_zero(make_model, make_call, output):
    handle = elastify(make_model(), FlexiDiT(rank=4))
    call = make_call()
    with handle.using(Mode(2)):
        before = output(handle.model, call)
        with torch.no_grad():
            for name, parameter in handle.model.named_parameters():
                if ".coarse_A." in name:
                    parameter.zero_()
        assert torch.equal(output(handle.model, call), before)


def test_config_round_trip():
    for method in (
        FlexiDiT(),
        FlexiDiT(recipe="shared", scales=(4,), resize="box", underlying=4),
        FlexiDiT(scales=(2, (2, 1, 1), (1, 2, 4))),
    ):
        assert method_from_config(method.name, method.to_config()) == method
        as_file = json.loads(json.dumps(method.to_config()))  # tuples become lists
        assert method_from_config(method.name, as_file) == method
    assert METHODS["flexidit"] is FlexiDiT
    assert FlexiDiT(scales=[2]).modes == (Mode(2),)


def test_scales_are_numbers_or_triples():
    method = FlexiDiT(scales=[2, [2, 1, 1], (1, 3, 5), (2, 2, 2)])
    assert method.scales == (2, (2, 1, 1), (1, 3, 5), (2, 2, 2))
    names = [mode.name for mode in method.modes]
    assert names == ["patch2", "patch2x1x1", "patch1x3x5", "patch2x2x2"]
    hash(method)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recipe": "full"}, "recipe = 'full'; legal: 'lora', 'shared'"),
        (
            {"scales": ()},
            r"scales = \(\); legal: at least one, all different, each a whole",
        ),
        ({"scales": (1, 2)}, r"scales = \(1, 2\); legal"),
        ({"scales": (2, 2)}, r"scales = \(2, 2\); legal"),
        ({"scales": (2.5,)}, r"scales = \(2.5,\); legal: .*three whole numbers \(t, h, w\) >= 1"),
        ({"scales": ((1, 2, 2), 2)}, r"scales = \(\(1, 2, 2\), 2\); legal: .*all different"),
        ({"scales": ((2, 1, 1), [2, 1, 1])}, "scales = .*; legal: at least one, all different"),
        ({"scales": ((1, 1, 1),)}, r"scales = \(\(1, 1, 1\),\); legal: .*not all 1"),
        ({"scales": ((2, 2),)}, r"scales = \(\(2, 2\),\); legal: .*three whole numbers"),
        ({"scales": ((1, 2, 2, 2),)}, "legal: .*three whole numbers"),
        ({"scales": ((1, 0, 2),)}, r"scales = \(\(1, 0, 2\),\); legal"),
        ({"scales": ((1, 2.0, 2),)}, r"scales = \(\(1, 2.0, 2\),\); legal"),
        ({"scales": ((True, 2, 2),)}, r"scales = \(\(True, 2, 2\),\); legal"),
        ({"scales": (True,)}, r"scales = \(True,\); legal"),
        ({"scales": "24"}, "legal: at least one"),
        ({"rank": 0}, "rank = 0; legal: a whole number >= 1"),
        ({"rank": 1.5}, "rank = 1.5; legal"),
        ({"resize": "cubic"}, "resize = 'cubic'; legal: box, pinv"),
        ({"underlying": 0}, "underlying = 0; legal: a whole number >= 1"),
    ],
)
def test_illegal_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        FlexiDiT(**settings)


def test_sizes_that_do_not_divide_the_underlying_patch_are_refused(model):
    with pytest.raises(ValueError, match=r"scales = \(3,\) with underlying = 2; legal"):
        FlexiDiT(recipe="shared", scales=(3,)).build(model, BACKBONE)
    for scale in ((1, 3, 2), (1, 2, 3)):  # along either axis
        with pytest.raises(ValueError, match=r"scales = .* with underlying = 2; legal"):
            FlexiDiT(recipe="shared", scales=(scale,)).build(model, BACKBONE)
    FlexiDiT(recipe="shared", scales=((1, 3, 6),), underlying=3).build(model, BACKBONE)


def test_lora_has_no_underlying_patch_so_any_scale_is_legal(make_model, make_call, output):
    handle = elastify(make_model(sample_size=24), FlexiDiT(scales=(3,), rank=4))
    with handle.using(Mode(3)):
        assert output(handle.model, make_call(side=24)).shape == (2, 1, 24, 24)


@both_recipes
def test_scales_that_are_not_square_or_do_not_divide_the_grid_run(
    make_model, make_call, output, recipe
):
    scales = ((1, 2, 4), (1, 1, 8)) if recipe == "shared" else (3, (1, 5, 2), (1, 1, 7))
    handle = elastify(make_model(), FlexiDiT(recipe=recipe, scales=scales, rank=4))
    call, seen = make_call(), []
    handle.model.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape)
    )
    for mode in handle.modes[1:]:
        with handle.using(mode):
            found = output(handle.model, call)
            alone = output(handle.model, {name: value[:1] for name, value in call.items()})
        assert seen[-2] == (2, count(mode), 32)
        assert handle.shape.tokens(mode) == count(mode)
        assert found.shape == (2, 1, 32, 32)
        torch.testing.assert_close(found[:1], alone, atol=1e-5, rtol=1e-5)


@both_recipes
@both_kinds
@pytest.mark.parametrize("scale", [(2, 1, 1), (2, 2, 2), (3, 2, 4)])
def test_a_film_at_rest_starts_as_its_frame(model, recipe, kind, scale):
    """Joining frames adds nothing that a single frame does not have (ragged for two frames)."""
    mode, still = Mode(scale), Mode((1, *scale[1:]))
    scales = (scale,) if still.is_full else (scale, still.patch_scale)
    sizes, x = fresh(model, recipe, kind, scales), torch.randn(1, 1, 32, 32)
    vectors = BACKBONE.vectors(x, Forward(grid=GRID, patch=BASE))
    tokens = sizes.embed(vectors.expand(-1, 3, -1, -1, -1), mode)
    if still.is_full:
        expected = model.pos_embed.proj(x).flatten(2).transpose(1, 2)
    else:
        expected = sizes.embed(vectors, still)
    frames = math.ceil(3 / scale[0])
    assert tokens.shape == (1, frames * count(still), 32)
    torch.testing.assert_close(tokens, expected.repeat(1, frames, 1), atol=1e-5, rtol=1e-5)
    hidden = torch.randn(1, count(still), 32)
    found = sizes.project(hidden.repeat(1, frames, 1), mode, (3, 8, 8))
    base = model.proj_out_2(hidden) if still.is_full else sizes.project(hidden, still, GRID)
    torch.testing.assert_close(found, base.repeat(1, 3, 1), atol=1e-5, rtol=1e-5)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="unknown method 'toad'; legal: flexidit, ddit"):
        method_from_config("toad", {})
    with pytest.raises(ValueError, match=r"'flexidit' is not understood: .*colour"):
        method_from_config("flexidit", {"colour": 1})
