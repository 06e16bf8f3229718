"""What pipelines give a model beside latent and prompt: IP-adapters, ControlNet."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tests.backbones.pipes import PIPES, embeddings
from tests.backbones.tiny import CASES
from tests.elastic_models import WEAK, call_of, elastic, run, run_as

from ditdial import FULL, Schedule, SparseDiT, elastify

GENERATOR_SEED = 21


def noisy(module, seed=GENERATOR_SEED):
    """A state dict of a module with noise on it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value + 0.3 * torch.randn(value.shape, generator=generator)
        for key, value in module.state_dict().items()
    }


# IP-adapters


def load_flux_ip_adapter(model):
    """As `FluxIPAdapterMixin.load_ip_adapter` does, from weights in the form of its files."""
    torch.manual_seed(GENERATOR_SEED)
    width, text = model.inner_dim, model.config.joint_attention_dim
    attention = {}
    for index in range(model.config.num_layers):
        for name in ("to_k_ip", "to_v_ip"):
            layer = torch.nn.Linear(text, width)
            attention |= {f"{index}.{name}.{k}": v for k, v in noisy(layer, index).items()}
    projection = diffusers.models.embeddings.ImageProjection(
        image_embed_dim=10, cross_attention_dim=text, num_image_text_embeds=4
    )
    # The file of such an adapter names the projection "proj".
    image = {k.replace("image_embeds", "proj"): v for k, v in noisy(projection).items()}
    model._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": attention}])
    return model


def load_sd3_ip_adapter(model):
    """As `SD3IPAdapterMixin.load_ip_adapter` does."""
    torch.manual_seed(GENERATOR_SEED)
    width, head = model.inner_dim, model.config.attention_head_dim
    attention = {}
    for index in range(len(model.attn_processors)):
        processor = diffusers.models.attention_processor.SD3IPAdapterJointAttnProcessor2_0(
            hidden_size=width, ip_hidden_states_dim=width, head_dim=head, timesteps_emb_dim=12
        )
        attention |= {f"{index}.{k}": v for k, v in noisy(processor, index).items()}
    projection = diffusers.models.embeddings.IPAdapterTimeImageProjection(
        embed_dim=10, output_dim=width, hidden_dim=12, heads=1, num_queries=3, timestep_in_dim=8
    )
    model._load_ip_adapter_weights({"image_proj": noisy(projection), "ip_adapter": attention})
    return model


@pytest.fixture
def pictures():
    """Embeddings of a picture and of a negative one, ``(rows, pictures, D)``."""
    return embeddings(1, 10), embeddings(1, 10, seed=6)


def flux_with_ip_adapter():
    pipe = PIPES["flux"].pipe()
    load_flux_ip_adapter(pipe.transformer)
    return pipe


def draw(pipe, positive, negative, **changes):
    """A picture under both embeddings, with guidance."""
    if isinstance(pipe, diffusers.FluxPipeline):
        return PIPES["flux"].draw(
            pipe,
            ip_adapter_image_embeds=[positive],
            negative_ip_adapter_image_embeds=[negative],
            **changes,
        )
    both = torch.cat([negative, positive])
    return PIPES["sd3"].draw(pipe, ip_adapter_image_embeds=both, **changes)


ADAPTERS = {"flux": load_flux_ip_adapter, "sd3": load_sd3_ip_adapter}


def with_ip_adapter(name):
    pipe = PIPES[name].pipe()
    ADAPTERS[name](pipe.transformer)
    return pipe


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_ip_adapters(name, when, pictures):
    positive, negative = pictures
    stock = with_ip_adapter(name)
    expected = draw(stock, positive, negative)
    assert not torch.equal(expected, draw(stock, negative, negative))
    if when == "before":
        pipe = with_ip_adapter(name)
        handle = PIPES[name].elastic(pipe)
    else:
        pipe = PIPES[name].pipe()
        handle = PIPES[name].elastic(pipe)
        ADAPTERS[name](pipe.transformer)
    assert torch.equal(draw(pipe, positive, negative), expected)
    handle.schedule = Schedule.constant(WEAK)
    coarse = draw(pipe, positive, negative)
    assert {call.mode for call in handle.report().calls} == {WEAK}
    assert not torch.allclose(coarse, draw(pipe, negative, negative), atol=1e-3)
    handle.remove()
    assert torch.equal(draw(pipe, positive, negative), expected)


@pytest.mark.parametrize("name", ADAPTERS)
def test_weak_guidance_sees_the_same_picture(name, pictures):
    """FLUX's pipeline writes the negative picture into the dictionary of the conditional call."""
    positive, negative = pictures
    pipe = with_ip_adapter(name)
    handle = PIPES[name].elastic(pipe)
    handle.schedule = Schedule.constant(FULL, guide=WEAK, guidance="weak")
    same = draw(pipe, positive, positive)
    assert torch.equal(draw(pipe, positive, negative), same)
    assert not torch.equal(draw(pipe, negative, positive), same)


@pytest.mark.parametrize("guidance", ["cfg", "weak"])
def test_packed_branches_have_pictures_of_their_own(guidance, pictures):
    pipe = with_ip_adapter("sd3")
    handle = PIPES["sd3"].elastic(pipe)
    handle.schedule = Schedule.constant(FULL, guide=WEAK, guidance=guidance)
    split = draw(pipe, *pictures)
    run_as(handle, packed=True)
    torch.testing.assert_close(draw(pipe, *pictures), split, rtol=1e-4, atol=1e-4)


# ControlNet


def controlnet(name, model):
    torch.manual_seed(GENERATOR_SEED)
    if name == "flux":
        heads = {key: model.config[key] for key in ("attention_head_dim", "num_attention_heads")}
        net = diffusers.FluxControlNetModel.from_transformer(
            model, num_layers=1, num_single_layers=1, **heads
        )
    else:
        net = diffusers.SD3ControlNetModel.from_transformer(
            model, num_layers=1, num_extra_conditioning_channels=0
        )
    net.load_state_dict(noisy(net))
    return net.eval()


def controlled(name, model):
    """A call with the residuals that a real ControlNet makes for it."""
    call, net = call_of(name), controlnet(name, model)
    with torch.no_grad():
        made = net(controlnet_cond=call["hidden_states"], **call)
    if name == "sd3":
        return call | {"block_controlnet_hidden_states": made.controlnet_block_samples}
    return call | {
        "controlnet_block_samples": made.controlnet_block_samples,
        "controlnet_single_block_samples": made.controlnet_single_block_samples,
    }


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_controlnet_residuals_act_in_coarse_modes(name):
    stock, handle = CASES[name].model(), elastic(name)
    call = controlled(name, stock)
    expected = run(stock, call)
    assert not torch.equal(expected, run(stock, call_of(name)))
    assert torch.equal(run(handle, call, FULL), expected)
    assert not torch.equal(run(handle, call, WEAK), run(handle, call_of(name), WEAK))


@pytest.mark.parametrize(("name", "depth"), [("flux", 4), ("sd3", 3)])
def test_controlnet_residuals_refuse_sparse_grids(name, depth):
    handle = elastify(CASES[name].model(), SparseDiT.for_depth(depth, pool=0))
    mode = next(mode for mode in handle.modes if mode.is_sparse)
    call = controlled(name, CASES[name].model())
    with pytest.raises(ValueError, match=r"control.* each base token, .*full mode"):
        run(handle, call, mode)


def test_packed_branches_with_a_controlnet_equal_two_calls():
    call = controlled("sd3", CASES["sd3"].model())
    call = {name: twice(value) for name, value in call.items()}
    handle = elastic("sd3")
    handle.schedule = Schedule.constant(FULL, guide=WEAK)
    with torch.no_grad():
        split = handle.model(**call).sample
        run_as(handle, packed=True)
        packed = handle.model(**call).sample
    torch.testing.assert_close(packed, split, rtol=1e-4, atol=1e-4)


def twice(value):
    """Both guidance branches of a call, in one batch."""
    if isinstance(value, list | tuple):
        return type(value)(twice(inner) for inner in value)
    return torch.cat([value] * 2)
