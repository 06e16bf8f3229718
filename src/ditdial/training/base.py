"""Train a class-conditional `DiTTransformer2DModel` from scratch by flow matching.

Coarse to fine: a model with a larger patch sees the same picture with fewer tokens. Train that
first, then let ``init_from`` grow it: all weights are kept, the embedding and output are resized,
and positions agree because the coarse model was given the centres of its patches in units of the
final grid (``position_scale``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from ditdial.backbones.dit import DiTBackbone
from ditdial.ops.patching import resize_embedding, resize_output, to_grouped
from ditdial.ops.positions import group_centres, sincos_2d
from ditdial.plain import json_files
from ditdial.plain.checks import require
from ditdial.training.config import Recipe, from_table
from ditdial.training.limits import AtMost, Level, check_numbers, require_memory
from ditdial.training.objectives import noisy_batch
from ditdial.training.trained_base import open_base

BYTES_PER_WEIGHT = 5 * 4
"""While AdamW trains in float32: weight, gradient, two moments, average."""


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """Table ``[base]``: the network and its objective.

    Args:
        position_scale: patches of the final model that one patch of this one covers per axis.
        level_mean, level_std: noise levels are drawn as ``sigmoid(mean + std * normal)``.
        small_sizes: sides in pixels at which the model sees pictures too, shrunk from
            ``data.image_size``.
        small_share: share of each batch that is shrunk, in equal parts for these sizes.
    """

    num_layers: Annotated[int, AtMost(1000)]
    num_attention_heads: Annotated[int, AtMost(1024)]
    attention_head_dim: Annotated[int, AtMost(1024)]
    patch_size: int
    num_classes: int
    label_dropout: float = 0.1
    level_mean: Level = 0.0
    level_std: Level = 1.0
    position_scale: Annotated[int, AtMost(64)] = 1
    init_from: str = ""
    small_sizes: tuple[int, ...] = ()
    small_share: float = 0.25

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "num_attention_heads",
            "attention_head_dim",
            "patch_size",
            "num_classes",
        ):
            require(getattr(self, name) >= 1, f"base.{name}", getattr(self, name), ">= 1")
        require(0 <= self.label_dropout < 1, "base.label_dropout", self.label_dropout, "[0, 1)")
        require(self.level_std > 0, "base.level_std", self.level_std, "> 0")
        require(self.position_scale >= 1, "base.position_scale", self.position_scale, ">= 1")
        some = isinstance(self.small_sizes, list | tuple)
        require(some, "base.small_sizes", self.small_sizes, "a list of sides, as [16]")
        object.__setattr__(self, "small_sizes", tuple(self.small_sizes))
        legal = f"multiples of base.patch_size = {self.patch_size}, all different"
        for size in self.small_sizes:
            whole = type(size) is int and size >= 1 and size % self.patch_size == 0
            once = self.small_sizes.count(size) == 1
            require(whole and once, "base.small_sizes", self.small_sizes, legal)
        alone = not self.small_sizes or self.position_scale == 1
        legal = "1 beside base.small_sizes, whose positions are those of the stock model"
        require(alone, "base.position_scale", self.position_scale, legal)
        require(0 < self.small_share < 1, "base.small_share", self.small_share, "(0, 1)")
        check_numbers(self, "base")
        width = self.num_attention_heads * self.attention_head_dim
        legal = f"with {self.num_attention_heads} heads a width, their product, that 4 divides"
        require(width % 4 == 0, "base.attention_head_dim", self.attention_head_dim, legal)
        weights = self.num_layers * width * (18 * width + self.num_classes)
        what = f"weights of {self.num_layers} layers with their gradients, moments and average"
        require_memory(weights * BYTES_PER_WEIGHT, "base: width", width, what)


class BaseTask:
    """Flow-matching training of a base model."""

    find_unused_parameters = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.settings = settings = from_table(BaseSettings, recipe.settings, "base")
        size, channels = recipe.data.image_size, recipe.data.channels
        legal = f"a divisor of data.image_size = {size}"
        require(size % settings.patch_size == 0, "base.patch_size", settings.patch_size, legal)
        for small in settings.small_sizes:
            legal = f"sides below data.image_size = {size}"
            require(small < size, "base.small_sizes", settings.small_sizes, legal)
        rows, least = self._rows(recipe.loop.batch_size), len(settings.small_sizes) + 1
        legal = f"at least one picture of each of {least} sizes in a batch"
        require(all(rows), "loop.batch_size", recipe.loop.batch_size, legal)
        tokens = (size // settings.patch_size) ** 2
        positions = tokens * settings.num_attention_heads * settings.attention_head_dim
        require_memory(8 * positions, "data.image_size", size, f"positions of {tokens} patches")
        torch.manual_seed(recipe.seed)
        self.module: Any = DiTTransformer2DModel(
            num_attention_heads=settings.num_attention_heads,
            attention_head_dim=settings.attention_head_dim,
            in_channels=channels,
            num_layers=settings.num_layers,
            sample_size=size,
            patch_size=settings.patch_size,
            num_embeds_ada_norm=settings.num_classes,
        )
        zero_modulation(self.module)
        if settings.init_from:
            grow(self.module, open_base(settings.init_from, recipe, "base.init_from"))
        if settings.position_scale > 1:
            place_at_centres(self.module, settings.position_scale)
        set_train_mode(self.module)

    @property
    def num_classes(self) -> int:
        """Labels are below it."""
        return self.settings.num_classes

    def to(self, device: torch.device) -> None:
        """Nothing but the module."""

    def progress(self, share: float) -> None:
        """Every step is alike."""

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Mean squared error against the unit-variance flow target, over pictures of all sizes."""
        settings, rows = self.settings, self._rows(len(images))
        sides = (self.recipe.data.image_size, *settings.small_sizes)
        loss = images.new_zeros(())
        for side, own, classes in zip(sides, images.split(rows), labels.split(rows), strict=True):
            shrunk = own if side == sides[0] else resized(own, side)
            null = settings.num_classes
            batch = noisy_batch(shrunk, classes, generator, settings, null_label=null)
            prediction = model(batch.x, timestep=batch.times, class_labels=batch.labels).sample
            each = (prediction.float() - batch.target).square().mean()
            loss = loss + each * (len(own) / len(images))
        return loss

    def _rows(self, count: int) -> list[int]:
        """Pictures of a batch at their own size, and at each small one."""
        settings = self.settings
        small = settings.small_sizes
        each = round(count * settings.small_share / len(small)) if small else 0
        return [count - each * len(small), *([each] * len(small))]

    def export(self, folder: Path, facts: dict[str, object]) -> None:
        """Save the stock model, with the data's statistics beside it."""
        self.module.eval().save_pretrained(folder)
        data = self.recipe.data
        card = {
            "data_mean": data.mean,
            "data_std": data.std,
            "recipe": json.loads(self.recipe.to_json()),
            **facts,
        }
        json_files.write(folder / "training.json", card)


def resized(images: Tensor, side: int) -> Tensor:
    """Pictures ``(B, C, S, S)`` at another side, as those who prepare pictures do it."""
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)


def zero_modulation(model: Any) -> None:
    """DiT's initialisation (2212.09748, section 3.2): blocks start as identity, output as zero."""
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def set_train_mode(model: nn.Module) -> None:
    """Train mode without diffusers' label dropout.

    Every block of the stock model holds a label table of its own and drops labels independently of
    the other blocks, so a sample would be half conditional. The loss drops labels once per sample
    instead.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.eval()


@torch.no_grad()
def place_at_centres(model: Any, scale: int) -> None:
    """Give each patch of a coarse model its centre in units of a grid ``scale`` times as fine."""
    side = model.config.sample_size // model.config.patch_size
    centres = group_centres(side * scale, scale)
    model.pos_embed.pos_embed.copy_(sincos_2d(centres, centres, model.inner_dim)[None])


@torch.no_grad()
def grow(model: Any, coarse: Any) -> None:
    """Start ``model`` from ``coarse``, the same network with a larger patch.

    Raises:
        ValueError: the two differ in more than the patch size.
    """
    ours, theirs = dict(model.config), dict(coarse.config)
    differing = {
        k for k in ours if not k.startswith("_") and k != "patch_size" and ours[k] != theirs.get(k)
    }
    if differing:
        raise ValueError(
            f"base.init_from differs in {sorted(differing)}; legal: only patch_size may differ"
        )
    patch = model.config.patch_size
    state = coarse.state_dict()
    backbone, size = DiTBackbone(), (1, patch, patch)
    embed = resize_embedding(backbone.patches.kernel(coarse)[0], size)
    rows, bias = (resize_output(x, size) for x in backbone.patches.rows(coarse))
    state["pos_embed.proj.weight"] = embed[:, :, 0]
    state["proj_out_2.weight"] = to_grouped(rows, (1, 1, 1), backbone.patches.output_layout).T
    state["proj_out_2.bias"] = to_grouped(bias, (1, 1, 1), backbone.patches.output_layout)[0]
    model.load_state_dict(state)
