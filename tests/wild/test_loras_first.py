"""A user's LoRA that was on the model before `elastify`, or changes its sizes after it."""

from __future__ import annotations

import functools
import warnings

import diffusers
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from tests.backbones.pipes import PIPES, transformer
from tests.elastic_models import call_of, run
from tests.wild.pictures import noise, picture, quiet

from ditdial import FULL, Mode, Schedule, elastify
from ditdial.layers.low_rank import MERGED
from ditdial.plan.execution import Execution
from ditdial.runtime.tensors import is_new

WEAK = Mode(2)
FLUX = PIPES["flux"]
TARGETS = {"style": ["attn.to_q", "attn.to_k"], "other": ["attn.to_v", "x_embedder", "proj_out"]}
SIZES = 98
"""New tensors of the tiny FLUX."""


@functools.cache
def lora(name):
    """The state of a LoRA as a file of one holds it."""
    model = transformer("flux")
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS[name]), name)
    generator = noise(len(name))
    state = get_peft_model_state_dict(model, adapter_name=name)
    return {
        f"transformer.{key}": 0.2 * torch.randn(value.shape, generator=generator)
        for key, value in state.items()
    }


@functools.cache
def adapter():
    """Of a base that never had a LoRA."""
    return FLUX.elastic(FLUX.pipe()).adapter()


def load(name, pipe):
    pipe.load_lora_weights(dict(lora(name)), adapter_name=name)


ACTIONS = {
    "load": functools.partial(load, "style"),
    "load other": functools.partial(load, "other"),
    "fuse": lambda pipe: pipe.fuse_lora(components=["transformer"]),
    "unfuse": lambda pipe: pipe.unfuse_lora(components=["transformer"]),
    "unload": lambda pipe: pipe.unload_lora_weights(),
    "half": lambda pipe: pipe.set_adapters("style", 0.5),
    "both": lambda pipe: pipe.set_adapters(["style", "other"], [1.0, 1.0]),
    "disable": lambda pipe: pipe.disable_lora(),
    "delete": lambda pipe: pipe.delete_adapters("style"),
    "draw": lambda pipe: FLUX.draw(pipe, guided=False),
}


def after(actions, *, merge=False):
    """A pipeline that all of this was done to, in this order, and its handle."""
    pipe, handle = FLUX.pipe(), None
    for action in actions.split(", "):
        if action == "elastify":
            handle = elastify(pipe, adapter(), execution=Execution(merge=merge))
        else:
            ACTIONS[action](pipe)
    assert handle is not None
    return pipe, handle


def drawn(pipe, handle):
    """The coarse picture and the full one."""
    pictures = []
    for mode in (WEAK, FULL):
        handle.schedule = Schedule.constant(mode)
        pictures.append(FLUX.draw(pipe, guided=False))
    return pictures


@functools.cache
def expected(state):
    """What a base gives that became elastic first: without, with, or with half of the LoRA."""
    return drawn(*after(STATES[state]))


STATES = {
    "nothing": "elastify",
    "style": "elastify, load",
    "half": "elastify, load, half",
    "other": "elastify, load other",
    "both": "elastify, load, load other, both",
}


def assert_like(actions, state, *, merge=False):
    pipe, handle = after(actions, merge=merge)
    assert sum(is_new(name) for name in handle.model.state_dict()) == SIZES
    assert len(handle.adapter().tensors) == SIZES
    for found, right in zip(drawn(pipe, handle), expected(state), strict=True):
        assert (found - right).abs().max() < 1e-4


def test_the_states_to_compare_with_are_all_different():
    for index, picture_of in enumerate((lambda x: expected(x)[0], lambda x: expected(x)[1])):
        names = list(STATES)
        for first in names:
            for second in names[names.index(first) + 1 :]:
                difference = (picture_of(first) - picture_of(second)).abs().max()
                assert difference > 0.05, (index, first, second)


@pytest.mark.parametrize("merge", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize(
    ("actions", "state"),
    [
        ("load, elastify, unload", "nothing"),
        ("load, elastify, draw, unload", "nothing"),
        ("load, elastify, disable, unload", "nothing"),
        ("load, elastify, elastify, unload", "nothing"),
        ("load, fuse, elastify, unfuse, unload", "nothing"),
        ("load, fuse, elastify, unload", "style"),
        ("load, elastify, fuse, unload", "style"),
        ("load, elastify, unload, load", "style"),
        ("load, elastify, unload, load, half", "half"),
        ("load, elastify, unload, load other", "other"),
        ("load other, elastify, unload", "nothing"),
        ("load, load other, elastify, unload", "nothing"),
    ],
)
@pytest.mark.filterwarnings("ignore:merge = True")
def test_a_lora_that_was_there_first_and_goes_leaves_the_coarse_picture_right(
    actions, state, merge
):
    assert_like(actions, state, merge=merge)


@pytest.mark.parametrize(
    ("actions", "state"),
    [
        ("load, elastify", "style"),
        ("load, unload, elastify", "nothing"),
        ("load, elastify, half", "half"),
        ("load, elastify, load other, both", "both"),
        ("load, load other, elastify, both", "both"),
        ("load, load other, elastify, delete", "other"),
        ("load, elastify, disable", "nothing"),
        ("load, elastify, delete", "nothing"),
        ("load, elastify, fuse", "style"),
        ("load, elastify, fuse, unfuse", "style"),
        ("load, fuse, elastify, unfuse", "style"),
        ("elastify, load, unload", "nothing"),
        ("elastify, load, unload, load", "style"),
        ("elastify, load, fuse, unload", "style"),
        ("elastify, load, fuse, unfuse, unload", "nothing"),
    ],
)
def test_other_orders_of_a_lora_and_elastify_give_the_right_pictures(actions, state):
    assert_like(actions, state)


def control():
    """A Control LoRA: it doubles the channels that the model is given."""
    embedder = FLUX.pipe().transformer.x_embedder
    sizes = {"lora_A.weight": (2, 2 * embedder.in_features), "lora_B.weight": (32, 2)}
    generator = noise(3)
    state = {
        f"transformer.x_embedder.{key}": 0.2 * torch.randn(size, generator=generator)
        for key, size in sizes.items()
    }
    head = transformer("flux").config.attention_head_dim
    norms = {
        f"transformer.transformer_blocks.0.attn.norm_{x}.weight": torch.ones(head) for x in "qk"
    }
    return state | norms | {"transformer.x_embedder.lora_B.bias": torch.zeros(32)}


def controlled(pipe):
    facts = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.5}
    return pipe("red cat", control_image=picture(), generator=noise(1), **FLUX.size, **facts).images


def control_pipeline():
    parts = FLUX.pipe().components
    kept = {key: parts[key] for key in parts if key not in ("image_encoder", "feature_extractor")}
    return quiet(diffusers.FluxControlPipeline(**kept))


def test_a_control_lora_after_elastify_is_refused_by_name_in_coarse_modes():
    pipe = control_pipeline()
    handle = elastify(pipe, adapter())
    pipe.load_lora_weights(control(), adapter_name="control")
    handle.schedule = Schedule.constant(WEAK)
    with pytest.raises((ValueError, RuntimeError)) as error:
        controlled(pipe)
    if "legal" not in str(error.value):  # torch's own error
        raise error.value
    assert "x_embedder" in str(error.value)


def test_a_control_lora_after_elastify_leaves_full_mode_as_it_is():
    stock = control_pipeline()
    stock.load_lora_weights(control(), adapter_name="control")
    pipe = control_pipeline()
    handle = elastify(pipe, adapter())
    handle.schedule = Schedule.constant(FULL)
    pipe.load_lora_weights(control(), adapter_name="control")
    assert torch.equal(controlled(pipe), controlled(stock))


def test_a_control_lora_that_goes_leaves_coarse_modes_as_they_were():
    pipe = control_pipeline()
    handle = elastify(pipe, adapter())
    assert len(handle.adapter().tensors) == SIZES
    pipe.load_lora_weights(control(), adapter_name="control")
    assert handle.adapter().base == adapter().base  # which the tensors fit, whatever is loaded
    handle.schedule = Schedule.constant(WEAK)
    with pytest.raises(
        RuntimeError, match=r"x_embedder has 32 inputs.*reset_to_overwritten_params"
    ):
        controlled(pipe)
    pipe.unload_lora_weights(reset_to_overwritten_params=True)
    alone = diffusers.FluxPipeline(**pipe.components)
    found = FLUX.draw(quiet(alone), guided=False)
    assert (found - expected("nothing")[0]).abs().max() < 1e-4
    handle.remove()
    right = control_pipeline()
    right.load_lora_weights(control(), adapter_name="control")
    right.unload_lora_weights(reset_to_overwritten_params=True)
    state, right_state = pipe.transformer.state_dict(), right.transformer.state_dict()
    assert state.keys() == right_state.keys()
    assert all(torch.equal(value, right_state[key]) for key, value in state.items())


def test_an_adapter_of_a_base_without_a_control_lora_is_refused_on_one_that_has_it():
    pipe = control_pipeline()
    pipe.load_lora_weights(control(), adapter_name="control")
    with pytest.raises(ValueError, match="in_channels"):
        elastify(pipe, adapter())


def test_layers_with_a_lora_are_merged_like_others():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe, handle = after("load, elastify", merge=True)
        drawn(pipe, handle)
    assert not [str(each.message) for each in caught if "merge" in str(each.message)]
    layer = handle.model.transformer_blocks[0].attn.to_q.base_layer
    assert [*layer.__dict__[MERGED]] == [WEAK.name]


@pytest.mark.parametrize("merge", [False, True], ids=["apart", "merged"])
def test_a_lora_on_a_parameter_acts_in_coarse_modes(merge):
    def predicted(merge, *, loaded):
        torch.manual_seed(4)
        model = transformer("flux")
        if loaded:
            target = {"target_modules": [], "target_parameters": ["attn.to_q.weight"]}
            inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, **target), model)
        handle = elastify(model, adapter(), execution=Execution(merge=merge))
        return run(handle, call_of("flux"), WEAK)

    found, right = predicted(merge, loaded=True), predicted(False, loaded=True)
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)
    assert (right - predicted(False, loaded=False)).abs().max() > 0.05


def test_what_a_run_costs_does_not_count_a_lora_or_its_layer_twice():
    _, with_loras = after("load, load other, elastify")
    assert with_loras.shape == elastify(FLUX.pipe(), adapter()).shape
