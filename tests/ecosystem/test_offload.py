"""Weights that accelerate or diffusers keep elsewhere between calls; the CPU is the device here."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from tests.backbones.tiny import CASES
from tests.elastic_models import MERGED, WEAK, call_of, elastic, run, shake

from ditdial import FULL, elastify
from ditdial.runtime.tensors import is_new

CPU = torch.device("cpu")
names = pytest.mark.parametrize("name", ["flux", "wan", "dit"])
recipes = pytest.mark.parametrize("recipe", ["lora", "shared"])


def sequential(model, folder):
    accelerate.cpu_offload(model, execution_device=CPU)


def disk(model, folder):
    accelerate.disk_offload(model, folder, execution_device=CPU)


def grouped(model, folder, kind="leaf_level", blocks=None):
    apply_group_offloading(
        model,
        onload_device=CPU,
        offload_device=CPU,
        offload_type=kind,
        num_blocks_per_group=blocks,
    )


def grouped_on_disk(model, folder):
    apply_group_offloading(
        model,
        onload_device=CPU,
        offload_device=CPU,
        offload_type="leaf_level",
        offload_to_disk_path=str(folder / "groups"),
    )


offloads = pytest.mark.parametrize("offload", [sequential, disk, grouped, grouped_on_disk])


def adapter_of(name, recipe):
    handle = elastic(name, recipe=recipe)
    if recipe == "shared":
        shake(handle.model, lambda key: not is_new(key), seed=6)
    return copy.deepcopy(handle.adapter())


@names
@recipes
@offloads
def test_offloading_after_elastify(name, recipe, offload, tmp_path):
    call, adapter = call_of(name), adapter_of(name, recipe)
    expected = elastify(CASES[name].model(), adapter)
    handle = elastify(CASES[name].model(), adapter)
    offload(handle.model, tmp_path)
    if offload in (sequential, disk):
        news = [p for k, p in handle.model.named_parameters() if is_new(k)]
        assert news
        assert all(parameter.is_meta for parameter in news)
    for mode in (FULL, WEAK, FULL, WEAK):
        assert torch.equal(run(handle, call, mode), run(expected, call, mode))
    for key, tensor in handle.adapter().tensors.items():
        assert torch.equal(tensor, adapter.tensors[key]), key
    stock = CASES[name].model()
    if recipe == "lora":
        handle.remove()
        assert torch.equal(run(handle.model, call), run(stock, call))
        return
    with pytest.raises(RuntimeError, match="cannot be put back while they are offloaded"):
        handle.remove()
    for mode in (FULL, WEAK):  # nothing has changed
        assert torch.equal(run(handle, call, mode), run(expected, call, mode))
    if offload in (sequential, disk):
        remove_hook_from_submodules(handle.model)
        handle.remove()
        assert torch.equal(run(handle.model, call), run(stock, call))


@pytest.mark.parametrize("offload", [sequential, grouped])
def test_offloading_before_elastify_is_refused(offload, tmp_path):
    call, model, stock = call_of("flux"), CASES["flux"].model(), CASES["flux"].model()
    offload(model, tmp_path)
    with pytest.raises(ValueError, match=r"are offloaded by .*legal: elastify first"):
        elastic("flux", model)
    assert torch.equal(run(model, call), run(stock, call))


@names
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_that_is_moved_as_a_whole(name, when):
    """As ``enable_model_cpu_offload`` does."""
    call, stock, model = call_of(name), CASES[name].model(), CASES[name].model()
    if when == "before":
        accelerate.cpu_offload_with_hook(model, execution_device=CPU)
        handle = elastic(name, model)
    else:
        handle = elastic(name, model)
        accelerate.cpu_offload_with_hook(model, execution_device=CPU)
    twin = elastic(name)
    for mode in (FULL, WEAK):
        assert torch.equal(run(handle, call, mode), run(twin, call, mode))
    handle.remove()
    assert torch.equal(run(model, call), run(stock, call))


@names
def test_offloaded_weights_are_not_merged(name, tmp_path):
    call, handle, apart = (
        call_of(name),
        elastic(name, execution=MERGED),
        elastic(name),
    )
    run(handle, call, WEAK)
    sequential(handle.model, tmp_path)
    with pytest.warns(UserWarning, match=r"merge = True, but (\d+) of \1 layers keep"):
        found = run(handle, call, WEAK)
    assert torch.equal(found, run(apart, call, WEAK))


@names
@recipes
@pytest.mark.parametrize(("kind", "blocks"), [("leaf_level", None), ("block_level", 1)])
def test_groups_bring_every_new_tensor_that_is_used(name, recipe, kind, blocks, monkeypatch):
    """On the CPU nothing would fail if one stayed away, so what is brought is written down."""
    brought, stock = set(), ModuleGroup.onload_

    def onload(group):
        for module in group.modules:
            brought.update(map(id, module.parameters()))
        brought.update(map(id, group.parameters))
        stock(group)

    handle = elastic(name, recipe=recipe)
    grouped(handle.model, None, kind, blocks)
    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    run(handle, call_of(name), WEAK)
    away = [k for k, p in handle.model.named_parameters() if is_new(k) and id(p) not in brought]
    assert away == []
