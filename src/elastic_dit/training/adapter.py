"""Train an adapter for a base: FlexiDiT by distillation (*lora*) or with all weights (*shared*).

The *lora* recipe needs no labels of quality, only samples: the frozen base in full mode is the
teacher, each coarse mode its student on the same noisy input (FlexiDiT section 4.2). The *shared*
recipe trains every weight on the data with the base's own objective, one patch size per step
(section 4.1, without the moment-matching term).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from elastic_dit.elastify import elastify
from elastic_dit.engine import is_new
from elastic_dit.methods.flexidit import FlexiDiT, SharedSizes
from elastic_dit.mode import FULL
from elastic_dit.ops.flow import network_input_and_target, stratified_levels
from elastic_dit.schedule import Schedule
from elastic_dit.training.config import Recipe, from_table, require


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Table ``[adapter]``.

    Args:
        base: folder of the trained base model.
        recipe: ``lora`` or ``shared``.
        scales: coarse sizes, in base patches per axis.
        min_levels: noise level below which a size is not trained, one per scale. The largest
            patches are only used on noisy pictures, and cannot represent clean ones.
        full_share: share of the steps that train full mode (shared).
        level_mean, level_std: noise levels are drawn as ``sigmoid(mean + std * normal)``.
        weak_fraction: of the default schedule that the adapter is shipped with.
    """

    base: str
    recipe: str = "lora"
    scales: list[int] = field(default_factory=lambda: [2, 4])
    min_levels: list[float] = field(default_factory=lambda: [0.0, 0.0])
    rank: int = 32
    resize: str = "pinv"
    full_share: float = 0.4
    label_dropout: float = 0.1
    level_mean: float = 0.0
    level_std: float = 1.0
    weak_fraction: float = 0.48

    def __post_init__(self) -> None:
        levels = self.min_levels
        legal = f"{len(self.scales)} numbers in [0, 1), one per scale"
        fits = len(levels) == len(self.scales) and all(0 <= x < 1 for x in levels)
        require(fits, "adapter.min_levels", levels, legal)
        require(0 <= self.full_share < 1, "adapter.full_share", self.full_share, "[0, 1)")
        require(0 <= self.label_dropout < 1, "adapter.label_dropout", self.label_dropout, "[0, 1)")
        require(self.level_std > 0, "adapter.level_std", self.level_std, "> 0")
        require(0 <= self.weak_fraction <= 1, "adapter.weak_fraction", self.weak_fraction, "[0, 1]")


class AdapterTask:
    """Training of a FlexiDiT adapter for a `DiTTransformer2DModel`."""

    find_unused_parameters = True

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.settings = settings = from_table(AdapterSettings, recipe.settings, "adapter")
        if not (Path(settings.base) / "config.json").is_file():
            raise FileNotFoundError(f"adapter.base = {settings.base!r} holds no model")
        torch.manual_seed(recipe.seed)
        method = FlexiDiT(
            recipe=settings.recipe,
            scales=tuple(settings.scales),
            rank=settings.rank,
            resize=settings.resize,
        )
        self.module: Any = DiTTransformer2DModel.from_pretrained(settings.base)
        self.module.eval()
        self.handle = elastify(self.module, method)
        self.shared = settings.recipe == "shared"
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(self.shared or is_new(name))
        if self.shared:
            sizes = self._shared_sizes()
            sizes.live = True
            for module in (self.module.pos_embed.proj, self.module.proj_out_2):
                module.requires_grad_(False)  # the underlying weights stand in for them

    def to(self, device: torch.device) -> None:
        """Nothing but the module."""

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Distillation loss, or the base's objective in one randomly drawn mode."""
        settings = self.settings
        count = len(images)
        level = stratified_levels(
            count, generator, mean=settings.level_mean, std=settings.level_std
        ).to(images)
        noise = torch.randn(images.shape, generator=generator).to(images)
        dropped = torch.rand(count, generator=generator) < settings.label_dropout
        labels = torch.where(
            dropped.to(labels.device), self.module.config.num_embeds_ada_norm, labels
        )
        x, target = network_input_and_target(images, noise, level[:, None, None, None])
        if self.shared:
            return self._denoise(model, x, level, labels, target, generator)
        return self._distil(model, x, level, labels)

    def _distil(self, model: nn.Module, x: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), self.handle.using(FULL):
            teacher = model(x, timestep=level * 1000, class_labels=labels).sample.float()
        total = x.new_zeros(())
        for mode, lowest in zip(self.handle.method.modes, self.settings.min_levels, strict=True):
            keep = level >= min(lowest, level.max().item())  # at least the noisiest picture
            with self.handle.using(mode):
                student = model(
                    x[keep], timestep=level[keep] * 1000, class_labels=labels[keep]
                ).sample
            total = total + (student.float() - teacher[keep]).square().mean()
        return total

    def _denoise(
        self,
        model: nn.Module,
        x: Tensor,
        level: Tensor,
        labels: Tensor,
        target: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        modes = self.handle.method.modes
        draw = torch.rand((), generator=generator).item()
        if draw < self.settings.full_share:
            mode, lowest = FULL, 0.0
        else:
            share = (draw - self.settings.full_share) / (1 - self.settings.full_share)
            index = int(share * len(modes))
            mode, lowest = modes[index], self.settings.min_levels[index]
        keep = level >= min(lowest, level.max().item())
        with self.handle.using(mode):
            prediction = model(
                x[keep], timestep=level[keep] * 1000, class_labels=labels[keep]
            ).sample
        return (prediction.float() - target[keep]).square().mean()

    def export(self, folder: Path, facts: dict[str, object]) -> None:
        """Save the adapter folder."""
        if self.shared:
            sizes = self._shared_sizes()
            sizes.write_base(self.module, self.handle.backbone)
            sizes.live = False
        self.handle.schedule = Schedule.weak_first(
            self.settings.weak_fraction, self.settings.scales[0]
        )
        notes = {"training": {"recipe": json.loads(self.recipe.to_json()), **facts}}
        self.handle.adapter(**notes).save(folder)

    def _shared_sizes(self) -> SharedSizes:
        sizes = self.handle.sizes
        assert isinstance(sizes, SharedSizes)
        return sizes
