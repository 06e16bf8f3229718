"""Training of SparseDiT: stages are drawn as levels come, and the export is what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from ditdial import FULL, Adapter, Mode, SparseDiT, elastify
from ditdial.ops.flow import level_quantile, level_share, min_snr_weight, stratified_levels
from ditdial.runtime.tensors import is_new
from ditdial.training.adapter import AdapterTask
from ditdial.training.config import load_recipe
from ditdial.training.data import ImageData
from ditdial.training.loop import train
from ditdial.training.sparse_stages import draw_stage

TABLE = """
[adapter]
base = "{folder}/base"
method = "sparsedit"
group = [1, 1, 1, 0]
stage_ends = [0.5, 0.0]
stage_modes = ["grid2", "grid3"]
rank = 4

"""
CALL = {
    "hidden_states": torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(3)),
    "timestep": torch.full((4,), 700.0),
    "class_labels": torch.arange(4) % 2,
}


@pytest.fixture
def recipe(recipe_with, make_model, tmp_path):
    path = recipe_with("adapter", TABLE)
    model = make_model(sample_size=16, num_embeds_ada_norm=2, num_layers=5)
    model.save_pretrained(tmp_path / "base")
    return lambda *overrides: load_recipe(path, ["loop.images=640", *overrides])


@pytest.fixture
def base(tmp_path):
    return lambda: DiTTransformer2DModel.from_pretrained(tmp_path / "base").eval()


def predict(handle, mode, output):
    with handle.using(mode):
        return output(handle.model, CALL)


def test_full_recipe_trains_all_weights_and_exports_them(recipe, base, output, losses):
    loaded = recipe()
    task = AdapterTask(loaded)
    export = train(loaded, task, ImageData(loaded.data))
    found = losses()
    assert sum(found[-10:]) < sum(found[:10])
    adapter = Adapter.from_pretrained(export)
    assert adapter.schedule.to_json() == task.handle.method.default_schedule.to_json()
    handle = elastify(base(), export)
    for mode in handle.modes:
        assert torch.equal(predict(handle, mode, output), predict(task.handle, mode, output))
    assert not torch.allclose(predict(handle, FULL, output), output(base(), CALL))
    handle.remove()
    assert torch.equal(output(handle.model, CALL), output(base(), CALL))


def test_lora_recipe_leaves_the_base_alone_and_comes_closer_to_it(recipe, base, output, tmp_path):
    loaded = recipe("adapter.recipe=lora")
    task = AdapterTask(loaded)
    start = AdapterTask(loaded).handle
    export = train(loaded, task, ImageData(loaded.data))
    stock, state = base().state_dict(), task.module.state_dict()
    assert all(torch.equal(state[name], stock[name]) for name in stock)
    handle, teacher = elastify(base(), export), output(base(), CALL)
    assert torch.equal(predict(handle, FULL, output), teacher)
    mode = Mode(token_grid=2)
    before, after = (
        (predict(each, mode, output) - teacher).square().mean() for each in (start, handle)
    )
    assert after < 0.9 * before


@pytest.mark.parametrize(
    "overrides",
    [
        ("adapter.random_grids=true",),
        ("adapter.min_snr_gamma=5",),
        ("adapter.distil=0.5",),
        ("adapter.distil=1",),
        ("adapter.recipe=lora", "adapter.random_grids=true"),
        ("adapter.recipe=lora", "adapter.stage_ends=[0.5, 0.2]"),
        ("adapter.stage_ends=[0.5, 0.2]",),
    ],
)
def test_every_option_gives_a_loss_and_gradients(recipe, overrides):
    task = AdapterTask(recipe(*overrides))
    images, labels = torch.randn(8, 1, 16, 16), torch.zeros(8, dtype=torch.long)
    found = []
    for seed in (0, 0, 1):
        loss = task.loss(task.module, images, labels, torch.Generator().manual_seed(seed))
        loss.backward()
        found.append(loss.item())
    assert found[0] == found[1] != found[2]
    trained = {k for k, p in task.module.named_parameters() if p.grad is not None}
    assert any(is_new(name) for name in trained)
    assert ("transformer_blocks.0.ff.net.2.weight" in trained) == (task.settings.recipe == "full")


def test_the_teacher_is_the_base_before_training(recipe, output, base):
    task = AdapterTask(recipe("adapter.distil=1"))
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(0.1)
    assert torch.equal(output(task.teacher.model, CALL), output(base(), CALL))
    assert "teacher" not in dict(task.module.named_modules())


def test_stages_are_drawn_as_often_as_their_levels_come():
    method = SparseDiT(stages=((0.7, 6), (0.2, 8)))
    levels = {"mean": 0.3, "std": 1.3}
    generator = torch.Generator().manual_seed(0)
    draws = [draw_stage(method, generator, random_grids=False, **levels) for _ in range(4000)]
    edges = {"grid6": (0.7, 1.0), "grid8": (0.2, 0.7), "full": (0.0, 0.2)}
    for name, (low, high) in edges.items():
        own = [draw for draw in draws if draw.mode.name == name]
        share = level_share(high, **levels) - level_share(low, **levels)
        assert len(own) / len(draws) == pytest.approx(share, abs=0.03)
        drawn = stratified_levels(64, generator, within=own[0].within, **levels)
        assert low - 1e-6 <= drawn.min()
        assert drawn.max() <= high + 1e-6
    anywhere = [draw_stage(method, generator, random_grids=True, **levels) for _ in range(40)]
    assert {draw.within for draw in anywhere} == {(0.0, 1.0)}
    assert {draw.mode.name for draw in anywhere} == {"grid6", "grid8"}


@pytest.mark.parametrize("level", [0.001, 0.2, 0.5, 0.93])
def test_shares_and_levels_are_inverse(level):
    share = level_share(level, mean=0.3, std=1.3)
    assert level_quantile(share, mean=0.3, std=1.3) == pytest.approx(level, rel=1e-6)
    drawn = stratified_levels(4000, torch.Generator().manual_seed(0), mean=0.3, std=1.3)
    assert (drawn < level).float().mean().item() == pytest.approx(share, abs=1e-3)


def test_min_snr_weights():
    """At gamma = 5 the weight is the error of predicted clean data up to SNR 5, then constant."""
    level = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    snr = ((1 - level) / level) ** 2
    expected = snr.clamp(max=5) / (snr + 1)
    torch.testing.assert_close(min_snr_weight(level, 5.0), expected)
    ends = min_snr_weight(torch.tensor([0.0, 1.0]), 5.0)
    assert ends.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.stage_modes=['patch2', 'grid3']", "stage_modes = .*legal: names of grids: gridK"),
        ("adapter.group=[1, 1]", r"group = \[1, 1\] .*legal: 4 whole numbers"),
        ("adapter.pool=2", r"are 6 blocks; legal: 5, .*for_depth\(5\)"),
        ("adapter.distil=2", r"distil = 2.0 .*legal: \[0, 1\]"),
        ("adapter.min_snr_gamma=-1", "min_snr_gamma = -1.0 .*legal: >= 0"),
        ("adapter.recipe=shared", "recipe = 'shared' .*legal: full, lora"),
        ("adapter.stage_modes=['grid2', 'grid9']", "'grid9' does not fit the 4x4 tokens"),
    ],
)
def test_illegal_settings_are_named(recipe, override, words):
    with pytest.raises(ValueError, match=words):
        AdapterTask(recipe(override))


def test_the_recipe_of_the_reference_model_fits_it():
    from ditdial.reference import load_reference

    path = Path(__file__).parents[2] / "recipes" / "mnist-sparsedit.toml"
    loaded = load_recipe(path)
    settings = dict(loaded.settings)
    assert settings.pop("base") == "runs/mnist-base/export"
    from ditdial.training.adapter import AdapterSettings

    method = AdapterSettings(base="", **settings).build()
    handle = elastify(load_reference().transformer, method)
    assert [mode.name for mode in handle.modes] == ["full", "grid4", "grid6"]
    assert handle.plan_levels([0.9, 0.1], guidance=True).ratio == pytest.approx(0.65, abs=0.005)
