"""Bases whose weights are quantised, in eight bits or in another dtype than what they are given."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import TorchAoConfig
from diffusers.hooks import HookRegistry
from tests.backbones.tiny import CASES
from tests.elastic_models import MERGED, WEAK, call_of, elastic, run, shake
from torch import nn

from ditdial import FULL, FlexiDiT, elastify
from ditdial.host.weights import NewLinear
from ditdial.plan.execution import Execution
from ditdial.runtime.tensors import is_new

names = pytest.mark.parametrize("name", ["flux", "wan", "dit"])
APART = r"merge = True, but \d+ of \d+ layers keep their low-rank updates unmerged"


# torchao


@pytest.fixture
def quantize():
    """Int8 weight-only, as `torchao.quantization.quantize_` and diffusers do it."""
    torchao = pytest.importorskip("torchao.quantization", reason="pip install torchao")

    def apply(model):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        return model

    return apply


def with_weights_of(model, quantised):
    """Give a floating model the values that a quantised one stands for."""
    with torch.no_grad():
        for key, module in quantised.named_modules():
            if type(getattr(module, "weight", None)).__name__ == "Int8Tensor":
                model.get_submodule(key).weight.copy_(module.weight.dequantize())
    return model


@names
@pytest.mark.parametrize("when", ["before", "after"])
def test_int8_weights(name, when, quantize):
    call, stock = call_of(name), quantize(CASES[name].model())
    if when == "before":
        handle = elastic(name, quantize(CASES[name].model()))
        floating = elastic(name, with_weights_of(CASES[name].model(), stock))
    else:
        handle, floating = elastic(name), elastic(name)
        quantize(handle.model)
        with_weights_of(floating.model, handle.model)
    assert torch.equal(run(handle, call, FULL), run(stock, call))
    coarse = run(handle, call, WEAK)
    torch.testing.assert_close(coarse, run(floating, call, WEAK), rtol=1e-4, atol=1e-4)
    for key, parameter in handle.model.named_parameters():
        if is_new(key):
            assert (type(parameter), parameter.dtype) == (nn.Parameter, torch.float32), key
    handle.remove()
    assert type(handle.model) is type(stock)
    assert torch.equal(run(handle.model, call), run(stock, call))


@names
@pytest.mark.parametrize("when", ["before", "after"])
def test_int8_weights_are_never_merged(name, when, quantize):
    call, handles = call_of(name), []
    for merge in (True, False):
        model = CASES[name].model()
        if when == "before":
            quantize(model)
        handle = elastic(name, model, execution=Execution(merge=merge))
        if when == "after":
            with torch.no_grad():
                run(handle, call, WEAK)  # makes merged copies of floating weights, which go stale
            quantize(model)
        handles.append(handle)
    with pytest.warns(UserWarning, match=APART):
        found = run(handles[0], call, WEAK)
    assert torch.equal(found, run(handles[1], call, WEAK))
    assert torch.equal(run(handles[0], call, FULL), run(handles[1], call, FULL))


def test_some_layers_quantised_leaves_the_others_merged(quantize):
    call, merged, apart = (
        call_of("flux"),
        elastic("flux", execution=MERGED),
        elastic("flux"),
    )
    for handle in (merged, apart):
        quantize(handle.model.transformer_blocks[0])
    with pytest.warns(UserWarning, match=APART):
        found = run(merged, call, WEAK)
    torch.testing.assert_close(found, run(apart, call, WEAK))


@names
def test_an_adapter_of_an_int8_base_is_saved_and_loaded(name, quantize, tmp_path):
    call, handle = call_of(name), elastic(name)
    quantize(handle.model)
    handle.adapter().save_pretrained(tmp_path / "adapter")
    again = elastify(quantize(CASES[name].model()), tmp_path / "adapter")
    for mode in (FULL, WEAK):
        assert torch.equal(run(again, call, mode), run(handle, call, mode))


def retrained(name):
    """An adapter with base weights of its own."""
    handle = elastic(name, recipe="shared")
    shake(handle.model, lambda key: not is_new(key), seed=6)
    return copy.deepcopy(handle.adapter())


@names
def test_retrained_bases_are_quantised_afterwards_only(name, quantize, tmp_path):
    call, adapter, stock = call_of(name), retrained(name), CASES[name].model()
    with pytest.raises(ValueError, match=r"trains the base's own weights.*Int8Tensor.*legal"):
        elastify(quantize(CASES[name].model()), adapter)
    model = CASES[name].model()
    handle = elastify(model, adapter)
    floating = {mode: run(handle, call, mode) for mode in (FULL, WEAK)}
    quantize(model)
    found = {mode: run(handle, call, mode) for mode in (FULL, WEAK)}
    for mode in (FULL, WEAK):
        assert not torch.equal(found[mode], floating[mode])
        torch.testing.assert_close(found[mode], floating[mode], rtol=0.1, atol=0.1)
    model.save_pretrained(tmp_path)  # takes the adapter off and puts it on again
    assert torch.equal(run(type(stock).from_pretrained(tmp_path), call), run(stock, call))
    for mode in (FULL, WEAK):
        assert torch.equal(run(handle, call, mode), found[mode])
    handle.remove()
    assert torch.equal(run(model, call), run(stock, call))
    assert all(type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_base_loaded_with_diffusers_torchao_config(name, quantize, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    model = CASES[name].model()
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["proj_out"])

    def load():
        stock_class, options = type(model), {"quantization_config": config}
        return stock_class.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, **options)

    call = {
        key: value.bfloat16() if torch.is_tensor(value) and "ids" not in key else value
        for key, value in call_of(name).items()
    }
    stock, handle = load(), elastic(name, load())
    assert any(type(p).__name__ == "Int8Tensor" for p in stock.parameters())
    assert torch.equal(run(handle, call, FULL), run(stock, call))
    coarse = run(handle, call, WEAK)
    assert coarse.dtype == torch.bfloat16
    assert coarse.isfinite().all()
    assert {p.dtype for k, p in handle.model.named_parameters() if is_new(k)} == {torch.bfloat16}


def test_weights_of_an_unknown_kind_are_refused():
    model = CASES["flux"].model()
    packed = torch.zeros(32, 16, dtype=torch.uint8)
    model.x_embedder.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"class Linear .* dtype torch.uint8.*legal"):
        elastify(model, FlexiDiT(scales=(2,)))
    assert "elastic" not in dict(model.named_children())


# Eight bits


def cast(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return model


def rounded_like(model, casted):
    """Round a model's weights to eight bits where a casted one keeps them so."""
    with torch.no_grad():
        for key, module in casted.named_modules():
            registry = getattr(module, "_diffusers_hook", None)
            if registry is None or registry.get_hook("layerwise_casting") is None:
                continue
            if not isinstance(module, NewLinear):
                for parameter in model.get_submodule(key).parameters(recurse=False):
                    parameter.copy_(parameter.to(torch.float8_e4m3fn).to(parameter.dtype))
    return model


@names
@pytest.mark.parametrize("when", ["before", "after"])
def test_eight_bit_storage_leaves_the_adapter_alone(name, when):
    call, stock = call_of(name), cast(CASES[name].model())
    if when == "before":
        handle = elastic(name, cast(CASES[name].model()))
        rounded = elastic(name, rounded_like(CASES[name].model(), stock))
    else:
        handle, rounded = elastic(name), elastic(name)
        cast(handle.model)
        rounded_like(rounded.model, handle.model)
    before = {k: p.clone() for k, p in handle.model.named_parameters() if is_new(k)}
    assert {p.dtype for p in before.values()} == {torch.float32}
    assert torch.equal(run(handle, call, FULL), run(stock, call))
    assert torch.equal(run(handle, call, WEAK), run(rounded, call, WEAK))
    for key, parameter in handle.model.named_parameters():
        if is_new(key):
            assert torch.equal(parameter, before[key]), key
    handle.remove()
    assert torch.equal(run(handle.model, call), run(stock, call))


def test_eight_bit_storage_is_never_merged():
    call, merged, apart = (
        call_of("flux"),
        elastic("flux", execution=MERGED),
        elastic("flux"),
    )
    for handle in (merged, apart):
        cast(handle.model)
    with pytest.warns(UserWarning, match=APART):
        found = run(merged, call, WEAK)
    assert torch.equal(found, run(apart, call, WEAK))


# Latents that do not fit


@names
def test_a_latent_of_another_dtype_is_refused_in_coarse_modes(name):
    call, stock, handle = call_of(name), CASES[name].model(), elastic(name)
    call["hidden_states"] = call["hidden_states"].bfloat16()
    with pytest.raises(RuntimeError) as of_stock:
        run(stock, call)
    with pytest.raises(RuntimeError) as of_full:
        run(handle, call, FULL)
    assert str(of_full.value) == str(of_stock.value)
    message = r"latent is torch.bfloat16 on cpu.*weights of mode 'patch2' are torch.float32 on cpu"
    with pytest.raises(ValueError, match=message):
        run(handle, call, WEAK)


@names
def test_a_latent_on_another_device_is_refused_in_coarse_modes(name):
    call, stock, handle = call_of(name), CASES[name].model(), elastic(name)
    call["hidden_states"] = call["hidden_states"].to("meta")
    errors = []
    for model, mode in ((stock, None), (handle, FULL)):
        try:
            run(model, call, mode)
        except (RuntimeError, NotImplementedError) as error:
            errors.append(type(error))
    assert len(errors) in (0, 2)
    assert len(set(errors)) < 2
    with pytest.raises(ValueError, match=r"torch.float32 on meta.*torch.float32 on cpu; legal"):
        run(handle, call, WEAK)


@names
def test_autocast_is_left_to_itself(name):
    call, stock, handle = call_of(name), CASES[name].model(), elastic(name)
    call["hidden_states"] = call["hidden_states"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(handle, call, FULL), run(stock, call))
        assert run(handle, call, WEAK).isfinite().all()


@names
def test_an_adapter_takes_the_dtype_of_its_base(name, tmp_path):
    handle = elastic(name)
    handle.adapter().save_pretrained(tmp_path / "adapter")
    again = elastify(CASES[name].model().bfloat16(), tmp_path / "adapter")
    for key, tensor in again.adapter().tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, handle.adapter().tensors[key].bfloat16())
    handle.adapter().save_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    wide = elastify(CASES[name].model(), tmp_path / "small")
    assert {t.dtype for t in wide.adapter().tensors.values()} == {torch.float32}
    small = {k: t.bfloat16() for k, t in wide.adapter().tensors.items()}
    assert all(torch.equal(t, small[k]) for k, t in again.adapter().tensors.items())


def test_hooks_are_found_where_diffusers_puts_them():
    """The names under which diffusers keeps the hooks that `ditdial.host.weights` looks for."""
    model = cast(CASES["flux"].model())
    registry = model.x_embedder._diffusers_hook
    assert isinstance(registry, HookRegistry)
    assert registry.get_hook("layerwise_casting").compute_dtype == torch.float32
