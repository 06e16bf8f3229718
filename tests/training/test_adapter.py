"""Adapter training: the base stays, the student learns, the export is what was trained."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file

from ditdial import FULL, Adapter, DDiT, Mode, Schedule, elastify
from ditdial.runtime.tensors import is_new
from ditdial.training.adapter import AdapterTask
from ditdial.training.config import load_recipe
from ditdial.training.data import ImageData
from ditdial.training.loop import train
from ditdial.training.state import list_states


@pytest.fixture
def run(adapter_recipe):
    """``run(*overrides)``: the finished task and its adapter folder."""

    def make(*overrides, resume=False):
        recipe = load_recipe(adapter_recipe, overrides)
        task = AdapterTask(recipe)
        return task, train(recipe, task, ImageData(recipe.data), resume=resume)

    return make


@pytest.fixture
def base(tmp_path):
    return lambda: DiTTransformer2DModel.from_pretrained(tmp_path / "base").eval()


def call_of(count=4):
    x = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    return {
        "hidden_states": x,
        "timestep": torch.full((count,), 700.0),
        "class_labels": torch.arange(count) % 2,
    }


def test_lora_training_leaves_the_base_alone_and_lowers_the_distillation_loss(
    run, base, output, losses
):
    task, export = run("loop.images=640")
    found = losses()
    assert sum(found[-5:]) < 0.7 * sum(found[:5])
    stock, state = base().state_dict(), task.module.state_dict()
    assert all(torch.equal(state[name], stock[name]) for name in stock)
    assert set(state) - set(stock) == {name for name in state if is_new(name)}

    call, model = call_of(), base()
    teacher = output(model, call)
    handle = elastify(model, export)
    assert torch.equal(output_of(handle, FULL, call, output), teacher)
    recipe = task.recipe
    start = AdapterTask(recipe).handle
    for mode in (Mode(2), Mode(4)):
        before = (output_of(start, mode, call, output) - teacher).square().mean()
        after = (output_of(handle, mode, call, output) - teacher).square().mean()
        assert after < 0.8 * before, mode


def output_of(handle, mode, call, output):
    with handle.using(mode):
        return output(handle.model, call)


def test_the_adapter_folder_says_how_it_was_made(run):
    task, export = run("loop.images=32", "adapter.weak_fraction=0.3")
    adapter = Adapter.from_pretrained(export)
    assert adapter.schedule == Schedule.weak_first(0.3, 2)
    assert adapter.method == task.handle.method
    assert adapter.notes["training"]["images_seen"] == 32
    assert adapter.notes["training"]["recipe"]["settings"]["rank"] == 4


def test_only_new_tensors_are_trained_and_kept(run, tmp_path):
    run("loop.images=32")
    (state,) = list_states(tmp_path / "adapter-run" / "checkpoints")
    assert all(is_new(name) for name in load_file(state / "model.safetensors"))


def test_shared_export_is_the_trained_live_path(run, base, output, losses):
    task, export = run("adapter.recipe=shared", "loop.images=640")
    found = losses()
    assert sum(found[-8:]) < sum(found[:8])
    call = call_of()
    task.handle._engine.wiring.new.live = True
    live = output_of(task.handle, FULL, call, output)
    task.handle._engine.wiring.new.live = False

    model = base()
    stock = output(model, call)
    handle = elastify(model, export)
    full = output_of(handle, FULL, call, output)
    assert (full - live).norm() < 1e-6 * live.norm()
    assert (full - stock).norm() > 1e-3 * stock.norm()  # it was trained
    for mode in (Mode(2), Mode(4)):
        expected = output_of(task.handle, mode, call, output)
        assert torch.equal(output_of(handle, mode, call, output), expected)
    handle.remove()
    assert torch.equal(output(model, call), stock)


@pytest.mark.parametrize("recipe", ["lora", "shared"])
def test_a_resumed_run_repeats_the_unbroken_one(run, assert_resumes, recipe):
    assert_resumes(run, f"adapter.recipe={recipe}")


def test_shared_training_starts_at_the_base(adapter_recipe, base, output):
    task = AdapterTask(load_recipe(adapter_recipe, ["adapter.recipe=shared"]))
    call = call_of()
    expected = output(base(), call)
    found = output_of(task.handle, FULL, call, output)
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_the_loss_is_a_function_of_the_generator(adapter_recipe):
    images, labels = torch.randn(16, 1, 16, 16), torch.zeros(16, dtype=torch.long)
    for recipe in ("lora", "shared"):
        task = AdapterTask(load_recipe(adapter_recipe, [f"adapter.recipe={recipe}"]))
        found = [
            task.loss(task.module, images, labels, torch.Generator().manual_seed(seed)).item()
            for seed in (0, 0, 1)
        ]
        assert found[0] == found[1] != found[2]


def test_a_batch_without_a_noisy_enough_picture_has_a_gradient(adapter_recipe):
    """All levels below ``min_levels``: rare in a large batch, likely in a small one."""
    task = AdapterTask(load_recipe(adapter_recipe, ["adapter.min_levels=[0.99, 0.99]"]))
    images, labels = torch.randn(2, 1, 16, 16), torch.zeros(2, dtype=torch.long)
    task.loss(task.module, images, labels, torch.Generator().manual_seed(0)).backward()


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("adapter.base=/nowhere", FileNotFoundError, "adapter.base = '/nowhere' holds no model"),
        ("adapter.recipe=full", ValueError, "recipe = 'full' is out of range; legal: lora, shared"),
        (
            "adapter.method=toad",
            ValueError,
            "method = 'toad' is out of range; legal: flexidit, ddit",
        ),
        (
            "adapter.stage_ends=[0.5, 0.2]",
            ValueError,
            "legal: 1 numbers, one for each of adapter.st",
        ),
        ("adapter.rank=0", ValueError, "rank = 0; legal: a whole number >= 1"),
        ("adapter.scales=[2, 5]", ValueError, "'patch5' does not fit the 1x4x4 .*at most 1x4x4"),
        ("adapter.scales=[2]", ValueError, r"min_levels = \[0.0, 0.4\] .*legal: 1 numbers"),
        ("adapter.colour=1", ValueError, r"\[adapter\] has no key 'colour'; legal keys: base"),
    ],
)
def test_illegal_settings_are_named(adapter_recipe, override, error, words):
    with pytest.raises(error, match=words):
        AdapterTask(load_recipe(adapter_recipe, [override]))


def test_going_on_from_an_adapter_trains_the_named_size_only(run, tmp_path):
    _, first = run()
    start = load_file(first / "adapter.safetensors")
    folder = tmp_path / "start"
    shutil.copytree(first, folder)
    shutil.rmtree(tmp_path / "adapter-run")
    task, second = run(f"adapter.init_from={folder}", "adapter.trained=[2]")
    assert [mode for mode, _ in task.modes] == [Mode(2)]
    found = load_file(second / "adapter.safetensors")
    changed = {name for name in start if not torch.equal(start[name], found[name])}
    assert changed == {name for name in start if "patch2" in name.split(".")}


def test_the_teacher_in_bfloat16_gives_nearly_the_same_loss(run, tmp_path, losses):
    run("loop.images=32")
    exact = losses()[0]
    shutil.rmtree(tmp_path / "adapter-run")
    run("loop.images=32", "adapter.teacher_dtype=bfloat16")
    assert losses()[0] == pytest.approx(exact, rel=0.02)
    assert losses()[0] != exact


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "adapter.trained=[3]",
            r"adapter.trained = \[3\] is out of range; legal: sizes of \[2, 4\]",
        ),
        ("adapter.teacher_dtype=int8", "adapter.teacher_dtype = 'int8' .*legal: float32, bfloat16"),
        ("adapter.init_from=nowhere", "nowhere"),
    ],
)
def test_bad_starts_are_refused(adapter_recipe, override, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        AdapterTask(load_recipe(adapter_recipe, [override]))


def test_an_adapter_of_another_kind_is_no_start(run, adapter_recipe, tmp_path):
    _, export = run()
    overrides = [f"adapter.init_from={export}", "adapter.rank=8"]
    with pytest.raises(ValueError, match=r"adapter.init_from = .* holds FlexiDiT.*rank=4.*legal"):
        AdapterTask(load_recipe(adapter_recipe, overrides))


def test_ddit_learns_from_the_frozen_base(run, base, output, losses):
    task, export = run("adapter.method=ddit", "loop.images=640")
    found = losses()
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    stock, state = base().state_dict(), task.module.state_dict()
    assert all(torch.equal(state[name], stock[name]) for name in stock)
    assert task.handle._engine.wiring.new.gates["patch2"].abs() > 0
    handle = elastify(base(), export)
    assert handle.method == DDiT(scales=(2, 4), rank=4)
    assert torch.equal(output_of(handle, FULL, call_of(), output), output(base(), call_of()))


def test_ppflow_trains_every_weight_on_its_own_stage(run, base, output, losses):
    task, export = run("adapter.method=ppflow", "adapter.gains=[0, 1]", "loop.images=640")
    found = losses()
    assert sum(found[-8:]) < sum(found[:8])
    stock, state = base().state_dict(), task.module.state_dict()
    moved = {name for name in stock if not torch.equal(state[name], stock[name])}
    assert {name for name in stock if name.endswith("weight")} - moved <= {"pos_embed.pos_embed"}
    handle = elastify(base(), export)
    assert [segment.gain for segment in handle.schedule.segments] == [0, 1]
    assert handle.schedule.modes == {Mode(2), FULL}
    trained = output_of(task.handle, Mode(2), call_of(), output)
    torch.testing.assert_close(output_of(handle, Mode(2), call_of(), output), trained)


def test_a_stage_sees_its_own_noise_levels_only(adapter_recipe):
    """Without pictures of a stage its layers get no gradient; shared blocks do."""
    overrides = ["adapter.method=ppflow", "adapter.level_mean=6", "adapter.level_std=0.1"]
    task = AdapterTask(load_recipe(adapter_recipe, overrides))
    images, labels = torch.randn(4, 1, 16, 16), torch.zeros(4, dtype=torch.long)
    task.loss(task.module, images, labels, torch.Generator().manual_seed(0)).backward()
    assert task.handle._engine.wiring.new.level_embeds["patch2"].grad.abs().max() > 0
    assert task.module.pos_embed.proj.weight.grad is None
    assert task.module.transformer_blocks[0].ff.net[2].weight.grad.abs().max() > 0


@pytest.mark.parametrize("method", ["recipe=shared", "method=ppflow"])
def test_with_a_teacher_the_base_itself_has_no_loss(adapter_recipe, method):
    """In full mode the base before training is its own teacher; data it does not fit exactly."""
    images, labels = torch.randn(16, 1, 16, 16), torch.zeros(16, dtype=torch.long)
    found = {}
    for share in (0, 0.5, 1):
        overrides = [f"adapter.{method}", f"adapter.distil={share}", "adapter.full_share=0.999"]
        if "ppflow" in method:
            overrides.append("adapter.stage_ends=[0.999]")
        task = AdapterTask(load_recipe(adapter_recipe, overrides))
        found[share] = task.loss(
            task.module, images, labels, torch.Generator().manual_seed(0)
        ).item()
    assert found[1] < 1e-9
    assert found[0.5] == pytest.approx(found[0] / 2, rel=1e-3)


def test_a_shared_adapter_trains_on_from_another(adapter_recipe, run, base, output):
    _, export = run("adapter.recipe=shared", "loop.images=64")
    overrides = ["adapter.recipe=shared", f"adapter.init_from={export}", "adapter.distil=1"]
    task = AdapterTask(load_recipe(adapter_recipe, overrides))
    call, model = call_of(), base()
    assert torch.equal(output(task.teacher.model, call), output(model, call))
    handle = elastify(model, export)
    for mode in (FULL, Mode(2)):
        expected = output_of(handle, mode, call, output)
        found = output_of(task.handle, mode, call, output)
        assert (found - expected).norm() < 1e-5 * expected.norm()
