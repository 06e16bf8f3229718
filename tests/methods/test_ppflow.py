"""PPFlow: stages, their projections, the level marker and the stages' guidance."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.backbones.tiny import CASES
from tests.elastic_models import call_of, run_as

from ditdial import FULL, Mode, PPFlow, elastify
from ditdial.methods import method_from_config
from ditdial.methods.ppflow import THREE_LEVELS, XL_2_SCALES, XL_3_SCALES, stage_gains
from ditdial.runtime.tensors import is_new

WIDE = Mode((1, 1, 2))


def elastic(model, **settings):
    torch.manual_seed(2)
    return elastify(model, PPFlow(**{"stages": THREE_LEVELS, **settings}))


def test_default_schedule_is_the_stages(make_model):
    schedule = elastic(make_model(), gains=(0, 1, 1.2)).schedule
    assert [schedule.at(level).mode for level in (1, 0.5, 0.49, 0.25, 0.24, 0)] == [
        Mode(2),
        Mode(2),
        WIDE,
        WIDE,
        FULL,
        FULL,
    ]
    assert [segment.gain for segment in schedule.segments] == [0, 1, 1.2]


@pytest.mark.parametrize("mode", [Mode(2), WIDE], ids=lambda m: m.name)
def test_new_sizes_average_the_input_and_repeat_the_output(make_model, make_call, output, mode):
    """Box start: a coarse patch is a base patch of the picture shrunk by averaging."""
    handle = elastic(make_model())
    call, k = make_call(), mode.patch_scale[1:]

    def blocks(x):
        return F.interpolate(F.avg_pool2d(x, k), scale_factor=k)

    with handle.using(mode):
        found = output(handle.model, call)
        averaged = call | {"hidden_states": blocks(call["hidden_states"])}
        torch.testing.assert_close(output(handle.model, averaged), found)
    torch.testing.assert_close(blocks(found), found)


def test_the_marker_goes_into_the_conditioning(make_model, make_call, output):
    """Marking a mode is the same as moving every block's conditioning vector by hand."""
    handle = elastic(make_model())
    call, marker = make_call(), torch.randn(32)
    with torch.no_grad():
        for parameter in handle._engine.wiring.new.level_embeds.parameters():
            parameter.zero_()
    full = output(handle.model, call)
    with torch.no_grad():
        handle._engine.wiring.new.level_embeds["patch2"].copy_(marker)
    assert torch.equal(output(handle.model, call | {"timestep": call["timestep"] - 400}), full) is (
        False
    )
    with handle.using(Mode(2)):
        marked = output(handle.model, call)
    for module in handle.model.modules():  # the last layer of the stock embedding
        if type(module).__name__ == "LabelEmbedding":
            module.embedding_table.weight.data += marker
    with torch.no_grad():
        handle._engine.wiring.new.level_embeds["patch2"].zero_()
    with handle.using(Mode(2)):
        torch.testing.assert_close(output(handle.model, call), marked)


def test_packed_rows_keep_their_own_marker(make_model, make_call, output, perturb):
    from ditdial import Schedule

    handle = elastic(make_model())
    perturb(handle.model, is_new)
    handle.schedule = Schedule.constant(WIDE, guide=Mode(2))
    call = make_call(guided=True)
    split = output(handle.model, call)
    run_as(handle, packed=True)
    torch.testing.assert_close(output(handle.model, call), split, atol=1e-5, rtol=1e-5)


def test_a_stage_without_guidance_skips_the_null_branch(make_model, make_call, output):
    handle = elastic(make_model(), gains=(0, 1, 1))
    output(handle.model, make_call(time=900.0, guided=True))
    (call,) = handle.report().calls
    assert call.guide is None
    assert call.macs == pytest.approx(2 * handle.shape.macs(Mode(2)))


def test_full_mode_is_the_stock_model_and_remove_is_exact(
    make_model, make_call, output, assert_stock
):
    handle = elastic(make_model())
    with handle.using(FULL):
        found = output(handle.model, make_call())
    assert torch.equal(found, output(make_model(), make_call()))
    handle.remove()
    assert_stock(handle.model, make_model())


def test_retrained_base_weights_travel_with_the_adapter(make_model, make_call, output, tmp_path):
    handle = elastic(make_model())
    with torch.no_grad():
        handle.model.transformer_blocks[0].ff.net[2].weight.mul_(1.5)
    expected = output(handle.model, make_call())
    handle.adapter().save_pretrained(tmp_path / "adapter")
    again = elastify(make_model(), tmp_path / "adapter")
    assert torch.equal(output(again.model, make_call()), expected)
    again.remove()
    assert torch.equal(output(again.model, make_call()), output(make_model(), make_call()))


def test_settings_survive_a_round_trip():
    method = PPFlow(stages=THREE_LEVELS, gains=(0, 1, 1))
    assert method_from_config("ppflow", method.to_config()) == method


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"stages": ()}, "stages"),
        ({"stages": ((0.5, 2), (0.6, 4))}, "stages"),
        ({"stages": ((1.0, 2),)}, "stages"),
        ({"stages": ((0.5, 2), (0.2, 2))}, "a size of its own"),
        ({"stages": ((0.5, 1),)}, "stages"),
        ({"gains": (1,)}, "2 numbers"),
        ({"gains": (1, -1)}, "gains"),
        ({"resize": "cubic"}, "resize"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        PPFlow(**settings)


# Options for the authors' checkpoints


@pytest.mark.parametrize("mode", [Mode(2), WIDE], ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "latte"])
def test_corners_have_the_positions_of_the_top_left_tokens(name, mode):
    """As the authors subsample the base's table, and not the mean of neighbouring vectors."""
    found = {}
    for positions in ("corner", "centre"):
        model = CASES[name].model()
        handle = elastic(model, positions=positions)
        wiring, embed = handle._engine.wiring, model.get_submodule(handle.backbone.patches.embed)
        with handle.using(FULL):
            model(**call_of(name, count=1))
        _, height, width = wiring.state.grid
        found[positions] = handle.backbone.positions(embed, wiring.state, mode)[0]
        base = handle.backbone.positions(embed, wiring.state, FULL)[0].unflatten(0, (height, width))
        k, wide = mode.patch_scale[1:]
        if positions == "corner":
            expected = base[::k, ::wide].flatten(0, 1).to(found[positions])
            torch.testing.assert_close(found[positions], expected)
    assert not torch.allclose(found["corner"], found["centre"])


def test_corners_are_kept_in_the_adapter_and_refused_elsewhere(make_model, tmp_path):
    handle = elastic(make_model(), positions="corner")
    handle.save(tmp_path)
    again = elastify(make_model(), tmp_path)
    assert again.method == PPFlow(stages=THREE_LEVELS, positions="corner")
    assert again._engine.wiring.state.corners
    assert "positions" not in PPFlow().to_config()  # as it was before there was a choice
    with pytest.raises(ValueError, match=r"positions = 'corner'; legal for FluxTrans.*: 'centre'"):
        elastify(CASES["flux"].model(), PPFlow(positions="corner"))
    with pytest.raises(ValueError, match="positions = 'top'; legal: 'centre', 'corner'"):
        PPFlow(positions="top")


def test_published_scales_of_the_stages():
    """A gain acts on the excess over 1 of the pipeline's scale, which is the largest."""
    for scales in (XL_2_SCALES, XL_3_SCALES):
        gains = stage_gains(scales)
        assert [1 + gain * (max(scales) - 1) for gain in gains] == pytest.approx(scales)
        assert gains[0] == 0  # the first stage makes no guidance call at all
    assert PPFlow(stages=THREE_LEVELS, gains=stage_gains(XL_3_SCALES)).gains[-1] == 1
    for scales in ((), (1.0, 1.0), (0.5, 3.0)):
        with pytest.raises(ValueError, match=r"scales = .*; legal: numbers >= 1"):
            stage_gains(scales)
