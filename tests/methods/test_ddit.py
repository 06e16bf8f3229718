"""DDiT's model side: what it adds, how it starts, what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from tests.elastic_models import run_as

from ditdial import FULL, DDiT, FlexiDiT, Mode, elastify
from ditdial.backbones.dit import DiTBackbone
from ditdial.methods import method_from_config
from ditdial.ops.patching import from_base
from ditdial.runtime.tensors import is_new

COARSE = [Mode(2), Mode(4), Mode((1, 1, 2))]


def elastic(model, **settings):
    torch.manual_seed(2)
    return elastify(model, DDiT(**{"rank": 4, "scales": (2, 4, (1, 1, 2)), **settings}))


def forced(handle, mode, call, output):
    with handle.using(mode):
        return output(handle.model, call)


@pytest.mark.parametrize("mode", COARSE, ids=lambda m: m.name)
def test_starts_as_flexidit_does(make_model, make_call, output, mode):
    """A closed gate and a zero second factor: only the projections act."""
    theirs = elastify(make_model(), FlexiDiT(rank=4, scales=(2, 4, (1, 1, 2))))
    expected = forced(theirs, mode, make_call(), output)
    found = forced(elastic(make_model()), mode, make_call(), output)
    assert torch.equal(found, expected)


def test_updates_go_to_the_feed_forward_alone(make_model):
    handle = elastic(make_model())
    layers = {name.partition(".coarse_")[0] for name, _ in handle.model.named_parameters()}
    adapted = {name for name in layers if is_new(f"{name}.coarse_A.x") and ".ff." in name}
    with_updates = {
        name.partition(".coarse_A")[0]
        for name, _ in handle.model.named_parameters()
        if ".coarse_A." in name
    }
    assert with_updates == {
        f"transformer_blocks.{block}.ff.net.{layer}"
        for block in (0, 1)
        for layer in ("0.proj", "2")
    }
    assert with_updates <= adapted


@pytest.mark.parametrize(("channels", "out_channels"), [(1, 1), (4, 8), (4, 4), (3, 2)])
def test_an_open_gate_adds_the_latent_to_the_prediction(make_model, output, channels, out_channels):
    """The path copies each channel to its own, whatever the two layouts of a patch."""
    handle = elastic(make_model(in_channels=channels, out_channels=out_channels))
    call = {
        "hidden_states": torch.randn(2, channels, 32, 32),
        "timestep": torch.full((2,), 500.0),
        "class_labels": torch.tensor([1, 2]),
    }
    shut = forced(handle, Mode(2), call, output)
    with torch.no_grad():
        handle._engine.wiring.new.gates["patch2"].fill_(0.5)
    shared = min(channels, out_channels)
    expected = shut.clone()
    expected[:, :shared] += 0.5 * call["hidden_states"][:, :shared]
    torch.testing.assert_close(forced(handle, Mode(2), call, output), expected)


def test_full_mode_is_the_stock_model_and_remove_is_exact(
    make_model, make_call, output, perturb, assert_stock
):
    handle = elastic(make_model())
    perturb(handle.model, is_new)
    assert torch.equal(forced(handle, FULL, make_call(), output), output(make_model(), make_call()))
    handle.remove()
    assert_stock(handle.model, make_model())


def test_packed_and_split_branches_agree(make_model, make_call, output, perturb):
    from ditdial import Schedule

    handle = elastic(make_model())
    perturb(handle.model, is_new)
    handle.schedule = Schedule.constant(Mode(2), guide=Mode(4))
    call = make_call(guided=True)
    split = output(handle.model, call)
    run_as(handle, packed=True)
    torch.testing.assert_close(output(handle.model, call), split, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_path_and_its_gate(make_model, make_call, perturb):
    handle = elastic(make_model())
    perturb(handle.model, is_new)
    with handle.using(Mode(2)):
        handle.model(**make_call()).sample.square().mean().backward()
    for group in (
        handle._engine.wiring.new.skips,
        handle._engine.wiring.new.gates,
        handle._engine.wiring.new.size_embeds,
    ):
        assert group["patch2"].grad.abs().max() > 0
        assert group["patch4"].grad is None


def test_settings_survive_a_round_trip(make_model):
    method = DDiT(scales=(2, (2, 1, 1)), rank=7)
    assert method_from_config("ddit", method.to_config()) == method


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"scales": ()}, "scales"),
        ({"scales": (1,)}, "scales"),
        ({"scales": (2, 2)}, "scales"),
        ({"rank": 0}, "rank = 0"),
        ({"resize": "nearest"}, "resize"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        DDiT(**settings)


def test_a_layout_only_permutes():
    """`from_base` undoes what `_channel_copy` relies on."""
    kernel = torch.arange(12.0).view(1, 3, 1, 2, 2)
    for layout in ("Cthw", "thwC"):
        from ditdial.ops.patching import to_grouped

        flat = to_grouped(kernel, (1, 1, 1), layout)
        assert torch.equal(from_base(flat, 3, (1, 2, 2), layout), kernel)
    assert DiTBackbone().patches.output_layout == "thwC"
