"""The base task: DiT's start, labels dropped once per sample, and growing to a smaller patch."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding, get_2d_sincos_pos_embed

from ditdial.training.base import (
    BaseTask,
    grow,
    place_at_centres,
    resized,
    set_train_mode,
    zero_modulation,
)
from ditdial.training.config import load_recipe
from ditdial.training.objectives import noisy_batch

SAME = {"atol": 1e-5, "rtol": 1e-4}


def test_the_start_predicts_nothing_and_learns(base_recipe, make_call):
    task = BaseTask(load_recipe(base_recipe))
    call = make_call(2, side=16)
    call["class_labels"] = torch.tensor([0, 1])
    assert task.module(**call).sample.abs().max() == 0
    images, labels = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 0, 1])
    loss = task.loss(task.module, images, labels, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(1.0, abs=0.2)  # the target has unit variance
    loss.backward()
    assert task.module.proj_out_2.weight.grad.abs().max() > 0
    assert task.module.transformer_blocks[0].ff.net[2].weight.grad.abs().max() == 0


def test_zero_modulation_zeroes_what_dit_zeroes(make_model):
    model = make_model()
    zero_modulation(model)
    zero = {n for n, p in model.named_parameters() if p.abs().max() == 0}
    layers = [f"transformer_blocks.{i}.norm1.linear" for i in range(2)]
    layers += ["proj_out_1", "proj_out_2"]
    assert zero == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_train_mode_has_no_label_dropout(make_model, make_call):
    model, call = make_model(), make_call(8)
    expected = model(**call).sample
    set_train_mode(model)
    assert model.training
    assert all(block.training for block in model.transformer_blocks)
    tables = [m for m in model.modules() if isinstance(m, LabelEmbedding)]
    assert len(tables) == 2
    assert not any(table.training for table in tables)
    for _ in range(5):
        assert torch.equal(model(**call).sample, expected)
    model.train()  # the stock behaviour that it avoids
    assert any(not torch.equal(model(**call).sample, expected) for _ in range(20))


def test_the_loss_is_a_function_of_the_generator_and_drops_labels(base_recipe, perturb):
    task = BaseTask(load_recipe(base_recipe, ["base.label_dropout=0.5"]))
    perturb(task.module)
    images, labels = torch.randn(64, 1, 16, 16), torch.zeros(64, dtype=torch.long)
    seen = []
    task.module.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
    )
    losses = [
        task.loss(task.module, images, labels, torch.Generator().manual_seed(seed)).item()
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
    assert set(seen[0].tolist()) == {0, 2}
    assert 0.25 < (seen[0] == 2).float().mean() < 0.75
    assert not torch.equal(seen[0], seen[2])


def test_export_is_the_trained_model(base_recipe, perturb, make_call, tmp_path):
    task = BaseTask(load_recipe(base_recipe))
    perturb(task.module)
    task.export(tmp_path / "export", {"images_seen": 3})
    call = make_call(2, side=16) | {"class_labels": torch.tensor([0, 1])}
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "export").eval()
    assert torch.equal(again(**call).sample, task.module(**call).sample)


def test_centres_are_the_means_of_the_fine_positions(make_model):
    model = make_model(sample_size=16)
    place_at_centres(model, 1)
    stock = make_model(sample_size=16).pos_embed.pos_embed
    torch.testing.assert_close(model.pos_embed.pos_embed, stock, atol=1e-6, rtol=1e-6)
    place_at_centres(model, 2)
    fine = get_2d_sincos_pos_embed(32, 8, base_size=8, output_type="pt").reshape(8, 8, 32)
    fine = fine.reshape(4, 2, 4, 2, 32).mean((1, 3)).reshape(1, 16, 32).float()
    slow = [6, 7, 22, 23]  # of the lowest frequencies, where the sine is nearly linear
    found = model.pos_embed.pos_embed[..., slow]
    torch.testing.assert_close(found, fine[..., slow], atol=1e-4, rtol=1e-4)


def grown(make_model, coarse_patch=8, patch=4):
    coarse = make_model(patch_size=coarse_patch)
    fine = DiTTransformer2DModel.from_config({**coarse.config, "patch_size": patch}).eval()
    grow(fine, coarse)
    return fine, coarse


def test_growing_copies_the_trunk_exactly(make_model):
    fine, coarse = grown(make_model)
    ours, theirs = fine.state_dict(), coarse.state_dict()
    resized = {"pos_embed.proj.weight", "proj_out_2.weight", "proj_out_2.bias"}
    assert ours.keys() == theirs.keys()
    for name in theirs.keys() - resized:
        assert torch.equal(ours[name], theirs[name]), name
    assert fine.config.patch_size == 4
    assert fine.pos_embed.pos_embed.shape == (1, 64, 32)


def blocks(picture, side):
    """Means of the blocks of ``side`` pixels."""
    return torch.nn.functional.avg_pool2d(picture, side)


@pytest.mark.parametrize(("coarse_patch", "patch"), [(8, 4), (8, 2)])
def test_growing_keeps_the_output_on_block_constant_pictures(
    make_model, make_call, coarse_patch, patch
):
    fine, coarse = grown(make_model, coarse_patch, patch)
    call = make_call(2)
    values = blocks(call["hidden_states"], coarse_patch)
    call["hidden_states"] = values.repeat_interleave(coarse_patch, 2).repeat_interleave(
        coarse_patch, 3
    )
    place_at_centres(coarse, coarse_patch // patch)

    def difference():
        with torch.no_grad():
            found, expected = (blocks(m(**call).sample, coarse_patch) for m in (fine, coarse))
        return ((found - expected).norm() / expected.norm()).item()

    near = difference()
    assert near < 0.5
    # Equal positions: the fine tokens of a block are copies of the coarse one, so exactly equal.
    with torch.no_grad():
        fine.pos_embed.pos_embed.zero_()
        coarse.pos_embed.pos_embed.zero_()
    assert difference() < 1e-5
    fresh = DiTTransformer2DModel.from_config(fine.config).eval()
    fine.load_state_dict(fresh.state_dict())
    assert difference() > 2 * near  # what not growing would give


def test_growing_from_another_network_is_refused(make_model):
    with pytest.raises(ValueError, match=r"differs in \['num_layers'\]; legal: only patch_size"):
        grow(make_model(), make_model(num_layers=3, patch_size=8))


def test_coarse_to_fine_through_recipes(base_recipe, make_model, tmp_path):
    coarse = make_model(sample_size=16, patch_size=8, num_embeds_ada_norm=2)
    coarse.save_pretrained(tmp_path / "coarse")
    task = BaseTask(load_recipe(base_recipe, [f"base.init_from={tmp_path}/coarse"]))
    ours, theirs = task.module.state_dict(), coarse.state_dict()
    name = "transformer_blocks.1.ff.net.2.weight"
    assert torch.equal(ours[name], theirs[name])
    assert ours["pos_embed.proj.weight"].shape[-1] == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("base.patch_size=5", "base.patch_size = 5 .*legal: a divisor of data.image_size = 16"),
        ("base.depth=3", r"\[base\] has no key 'depth'; legal keys: attention_head_dim"),
        ("base.init_from=/nowhere/at/all", "nowhere"),
        ("base.small_sizes=[6]", r"small_sizes = \(6,\) .*legal: multiples of base.patch_size = 4"),
        ("base.small_sizes=[8, 8]", "legal: multiples of .*, all different"),
        ("base.small_sizes=[16]", "legal: sides below data.image_size = 16"),
        ("base.small_sizes=8", r"small_sizes = 8 .*legal: a list of sides, as \[16\]"),
        ("base.small_share=1.0", r"base.small_share = 1.0 .*legal: \(0, 1\)"),
    ],
)
def test_illegal_settings_are_named(base_recipe, override, words):
    with pytest.raises((ValueError, OSError), match=words):
        BaseTask(load_recipe(base_recipe, [override]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["base.small_share=0.01"], "loop.batch_size = .*; legal: at least one picture of each"),
        (["base.position_scale=2"], "base.position_scale = 2 .*legal: 1 beside base.small_sizes"),
    ],
)
def test_sizes_that_do_not_fit_the_rest_are_named(base_recipe, overrides, words):
    with pytest.raises(ValueError, match=words):
        BaseTask(load_recipe(base_recipe, ["base.small_sizes=[8]", *overrides]))


def test_a_batch_is_seen_at_all_sizes(base_recipe, perturb):
    """The loss is the mean over pictures; shrunk ones are smooth, as large ones are not."""
    overrides = ["base.small_sizes=[8, 12]", "base.small_share=0.5"]
    task = BaseTask(load_recipe(base_recipe, overrides))
    perturb(task.module)
    images, labels = torch.randn(16, 1, 16, 16), torch.zeros(16, dtype=torch.long)
    seen = []
    task.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss = task.loss(task.module, images, labels, torch.Generator().manual_seed(0))
    assert [tuple(x.shape) for x in seen] == [(8, 1, 16, 16), (4, 1, 8, 8), (4, 1, 12, 12)]
    assert loss.isfinite()
    small = resized(images, 8)
    assert small.std() < 0.7 * images.std()
    constant = torch.full((1, 1, 16, 16), 0.3)
    torch.testing.assert_close(resized(constant, 8), torch.full((1, 1, 8, 8), 0.3))


def test_one_size_is_as_before(base_recipe, perturb):
    """Without other sizes the loss has the same randomness as it always had."""
    task = BaseTask(load_recipe(base_recipe))
    perturb(task.module)
    images, labels = torch.randn(8, 1, 16, 16), torch.zeros(8, dtype=torch.long)
    found = task.loss(task.module, images, labels, torch.Generator().manual_seed(0))
    settings = task.settings
    batch = noisy_batch(
        images, labels, torch.Generator().manual_seed(0), settings, null_label=settings.num_classes
    )
    prediction = task.module(batch.x, timestep=batch.times, class_labels=batch.labels).sample
    torch.testing.assert_close(found, (prediction - batch.target).square().mean())
