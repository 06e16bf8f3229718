"""Training of routed widths: what is trained, towards which work, and exactly how it resumes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file

from ditdial import FULL, Mode, elastify
from ditdial.training.config import load_recipe
from ditdial.training.data import ImageData
from ditdial.training.loop import train
from ditdial.training.objectives import noisy_batch
from ditdial.training.teacher import distilled
from ditdial.training.width import WidthTask

HALF = Mode(width=0.5)


@pytest.fixture
def run(width_recipe):
    """``run(*overrides)``: the finished task and its adapter folder."""

    def make(*overrides, resume=False):
        recipe = load_recipe(width_recipe, overrides)
        task = WidthTask(recipe)
        return task, train(recipe, task, ImageData(recipe.data), resume=resume)

    return make


def data(count=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 16, 16, generator=generator), torch.arange(count) % 2


def test_an_adapter_of_two_widths_comes_out(run, tmp_path):
    task, export = run()
    base = DiTTransformer2DModel.from_pretrained(tmp_path / "base").eval()
    handle = elastify(base, export)
    assert handle.modes == (FULL, Mode(width=0.7), HALF)
    assert handle.schedule.modes == {Mode(width=0.7)}
    shares = handle._engine.wiring.new.routers["width50"].token_shares
    assert (shares > 0).all()
    assert (shares < 1).any()
    assert torch.equal(shares, task.routed.routers["width50"].token_shares)


@pytest.mark.parametrize("recipe", ["full", "td-lora"])
def test_a_resumed_run_repeats_the_unbroken_one(run, assert_resumes, recipe):
    assert_resumes(run, f"width.recipe={recipe}")


def test_experts_leave_the_base_alone(run, tmp_path):
    before = DiTTransformer2DModel.from_pretrained(tmp_path / "base").state_dict()
    task, export = run("width.recipe=td-lora")
    held = load_file(export / "adapter.safetensors")
    assert not any(name.startswith("base.") for name in held)
    assert any(".B." in name and value.abs().max() > 0 for name, value in held.items())
    task.handle.remove()
    after = task.module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_work_is_pulled_to_the_width(width_recipe):
    """With nothing else in the loss, half of the work is left out, in the mean."""
    task = WidthTask(load_recipe(width_recipe, ["width.widths=[0.5]", "width.tokens=false"]))
    images, labels = data()
    narrow = task.routed
    optimizer = torch.optim.Adam(narrow.routers.parameters(), lr=0.1)
    task.progress(0.5)
    narrow.gated = True
    for step in range(150):
        narrow.drawing = torch.Generator().manual_seed(step)
        with task.handle.using(HALF):
            task.module(images, timestep=torch.linspace(0, 999, 16), class_labels=labels)
        work = task._work(HALF, task.widths.last)
        optimizer.zero_grad()
        (work - task._aim(HALF)).square().backward()
        optimizer.step()
    works = torch.tensor(task.works[HALF])
    assert work.item() == pytest.approx(0.5, abs=0.05)
    assert works.sum() > 0


def test_the_target_comes_down_and_the_full_pass_goes(width_recipe):
    task = WidthTask(load_recipe(width_recipe, ["width.ramp=0.5", "width.complete=0.2"]))
    aims = []
    for share in (0.0, 0.25, 0.5, 1.0):
        task.progress(share)
        aims.append(task._aim(HALF))
    assert aims == [1.0, 0.75, 0.5, 0.5]
    passes = []
    stock = task._error
    task._error = lambda *given: passes.append(given[2]) or stock(*given)
    for share in (0.1, 0.3):
        task.progress(share)
        task.loss(task.module, *data(), torch.Generator().manual_seed(0))
    assert [mode.is_full for mode in passes] == [False, True, False]


def test_gates_settle_in_the_end(width_recipe):
    """The same pictures and levels: noise differs before, and is gone after."""
    task = WidthTask(load_recipe(width_recipe, ["width.settle=0.5", "width.complete=0.0"]))
    images, labels = data()

    def shares(progress):
        task.progress(progress)
        task.loss(task.module, images, labels, torch.Generator().manual_seed(0))
        return task.widths.last.opens["heads"][0].share

    assert len(shares(0.2).unique()) > 1
    assert torch.equal(shares(0.8), torch.ones(16))  # logits of +1 run as open


def test_distillation_compares_with_the_base_that_was(width_recipe, tmp_path):
    """At first with nothing left out the student is its teacher; later the base stays what it was.

    A share of one half weighs the data's error and the base's alike.
    """
    task = WidthTask(load_recipe(width_recipe, ["width.distil=1", "width.complete=0.0"]))
    base = DiTTransformer2DModel.from_pretrained(tmp_path / "base").eval()
    images, labels = data()
    batch = noisy_batch(
        images, labels, torch.Generator().manual_seed(0), task.settings, null_label=2
    )
    with torch.no_grad():
        expected = base(batch.x, timestep=batch.times, class_labels=batch.labels).sample
        assert task._error(task.module, batch, FULL, task.teacher.predict(batch)) == 0
        for parameter in task.module.parameters():
            parameter.add_(0.1)
        taught = task.teacher.predict(batch)
        task.routed.gated = True
        error = task._error(task.module, batch, HALF, taught)
    torch.testing.assert_close(taught, expected)
    data_error = ((batch.target - expected) ** 2).mean()
    assert error > 0
    assert distilled(expected, batch.target, taught, 0.5).mean() == pytest.approx(
        0.5 * data_error.item(), rel=1e-5
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_of_a_distilled_width_has_gradients(width_recipe, share):
    task = WidthTask(load_recipe(width_recipe, [f"width.distil={share}"]))
    losses = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        losses.append(task.loss(task.module, *data(), generator))
    assert losses[0].item() == losses[1].item() != losses[2].item()
    losses[0].backward()
    assert task.module.proj_out_2.weight.grad.abs().max() > 0
    assert (task.teacher is None) == (share == 0)


def test_the_static_control_trains_nothing_but_the_full_pass(run):
    task, export = run("width.static=true")
    held = load_file(export / "adapter.safetensors")
    routers = {k: v for k, v in held.items() if "routers" in k and k.endswith("head_bias")}
    assert routers
    assert all((value == 1.0).all() for value in routers.values())
    assert task.handle.schedule.modes == {FULL}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("width.ramp=1.5", r"width.ramp = 1.5 is out of range; legal: \[0, 1\]"),
        ("width.settle=-0.1", r"width.settle = -0.1"),
        ("width.budget_weight=-1", r"width.budget_weight = -1"),
        ("width.widths=[1.0]", r"widths = .*legal"),
        ("width.groups=7", r"groups = 7"),
        ("width.distil=1.2", r"width.distil = 1.2 is out of range; legal: \[0, 1\]"),
        ("width.teacher_dtype=int8", r"width.teacher_dtype = 'int8'.*float32, bfloat16"),
        ("width.recipe=lora", r"recipe = 'lora'; legal: full, td-lora"),
    ],
)
def test_illegal_settings_are_named(width_recipe, override, words):
    with pytest.raises(ValueError, match=words):
        WidthTask(load_recipe(width_recipe, [override]))


def test_a_control_has_no_teacher(width_recipe):
    overrides = ["width.static=true", "width.distil=0.5"]
    with pytest.raises(ValueError, match=r"width.distil = 0.5.*0 with width.static"):
        WidthTask(load_recipe(width_recipe, overrides))


def test_a_base_that_is_not_there(width_recipe):
    with pytest.raises(FileNotFoundError, match=r"width.base = 'nowhere' holds no model"):
        WidthTask(load_recipe(width_recipe, ["width.base=nowhere"]))


def budget_loss(task, images, labels, times, seed):
    """Distance of the work from the width, with the same gates whoever asks."""
    task.routed.gated = True
    with task.handle.using(HALF):
        task.module(images, timestep=times, class_labels=labels)
    return (task._work(HALF, task.widths.last) - 0.5) ** 2


def half_of(rank, store, recipe, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    task = WidthTask(load_recipe(recipe))
    spread(task)
    images, labels = data()
    own = slice(8 * rank, 8 * rank + 8)
    loss = budget_loss(task, images[own], labels[own], torch.linspace(0, 999, 16)[own], 0)
    loss.backward()
    torch.save(gradients(task) | {"loss": loss.detach()}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def spread(task):
    """Logits on both sides of zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in task.routed.routers.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))


def gradients(task):
    named = task.routed.routers.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
def test_two_processes_pull_as_one_on_the_joined_batch(width_recipe, tmp_path):
    """The mean over processes is taken before the square, with its gradient."""
    task = WidthTask(load_recipe(width_recipe))
    spread(task)
    loss = budget_loss(task, *data(), torch.linspace(0, 999, 16), 0)
    loss.backward()
    expected = gradients(task)
    torch.multiprocessing.spawn(
        half_of, args=(tmp_path / "store", width_recipe, tmp_path), nprocs=2
    )
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for each in found:
        torch.testing.assert_close(each["loss"], loss.detach())
    for name, gradient in expected.items():
        # As in data parallel training: gradients of the processes are averaged.
        mean = (found[0][name] + found[1][name]) / 2
        torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-8)
