"""Train an adapter of any patch-size method for a base.

By distillation (FlexiDiT *lora*, section 4.2 there; DDiT): it needs no labels of quality, only
samples. The frozen base in full mode is the teacher, each coarse mode its student on the same noisy
input.

With all weights on the data, by the base's own objective, or towards the base that was, by the
share ``distil``: FlexiDiT *shared* draws one patch size per step (section 4.1, without the
moment-matching term); PPFlow gives every sample to the stage of its noise level, so that each size
only sees its own (section 3.2 there). SparseDiT draws one stage per step
(`ditdial.training.sparse_stages`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ditdial.adapter import Adapter
from ditdial.elastify import elastify
from ditdial.methods import DDiT, FlexiDiT, Method, PPFlow, SparseDiT
from ditdial.methods.flexidit import SharedPatches
from ditdial.plain.checks import did_you_mean, require
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.schedule import Schedule
from ditdial.runtime.model_class import engine_of
from ditdial.runtime.tensors import is_new
from ditdial.training.config import Recipe, from_table
from ditdial.training.limits import AtMost, Level, check_numbers
from ditdial.training.objectives import NoisyBatch, noisy_batch
from ditdial.training.sparse_stages import SparseSettings, draw_stage, min_snr_weighted
from ditdial.training.teacher import DTYPES, Teacher, distilled, teaching
from ditdial.training.trained_base import open_base

TRAINED: dict[str, type[Method]] = {
    method.name: method for method in (FlexiDiT, DDiT, PPFlow, SparseDiT)
}
"""Methods that this task trains; DyDiT has a task of its own, and a combination has none."""

STAGED = ("ppflow", "sparsedit")
"""Methods whose modes belong to stages of the noise level; the others have sizes."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(SparseSettings):
    """Table ``[adapter]``.

    Args:
        base: folder of the trained base model.
        method: ``flexidit``, ``ddit``, ``ppflow`` or ``sparsedit``.
        recipe: of the method; its first by default. FlexiDiT has ``lora`` and ``shared``.
        init_from: folder of an adapter of this base to start from; its method replaces ``recipe``,
            ``scales``, ``rank`` and ``resize``, which must agree.
        scales: coarse sizes, in base patches per axis.
        trained: the sizes of them to train (lora); all by default. The others stay as they start.
        min_levels: noise level below which a size is not trained, one per scale. The largest
            patches are only used on noisy pictures, and cannot represent clean ones.
        full_share: share of the steps that train full mode (shared).
        stage_ends, stage_modes: of PPFlow, instead of ``scales``: the noise level where each coarse
            stage ends, and its mode (``patch2``, ``patch1x1x2``). Of SparseDiT likewise.
        gains: guidance gains of all its stages in the default schedule.
        level_mean, level_std: noise levels are drawn as ``sigmoid(mean + std * normal)``.
        distil: share of the loss that compares with the base in full mode, as it was before
            training, instead of the data, in [0, 1]. Recipe ``lora`` always does.
        teacher_dtype: of the teacher's forward pass. ``bfloat16`` nearly halves its time,
            also on a CPU that has it, with an error far below what is distilled; ``float32`` leaves
            the loop's own precision.
        weak_fraction: of the default schedule that the adapter is shipped with.
    """

    base: str
    init_from: str = ""
    method: str = "flexidit"
    recipe: str = ""
    trained: list[int] = field(default_factory=list)
    scales: list[int] = field(default_factory=lambda: [2, 4])
    min_levels: list[float] = field(default_factory=lambda: [0.0, 0.0])
    rank: Annotated[int, AtMost(4096)] = 32
    resize: str = "pinv"
    full_share: float = 0.4
    stage_ends: list[float] = field(default_factory=lambda: [0.5])
    stage_modes: list[str] = field(default_factory=lambda: ["patch2"])
    gains: list[float] = field(default_factory=list)
    label_dropout: float = 0.1
    level_mean: Level = 0.0
    level_std: Level = 1.0
    distil: float = 0.0
    teacher_dtype: str = "float32"
    weak_fraction: float = 0.48

    def __post_init__(self) -> None:
        super().__post_init__()
        legal = ", ".join(TRAINED) + did_you_mean(self.method, TRAINED)
        require(self.method in TRAINED, "adapter.method", self.method, legal)
        recipes = TRAINED[self.method].recipes
        object.__setattr__(self, "recipe", self.recipe or recipes[0])
        require(self.recipe in recipes, "adapter.recipe", self.recipe, ", ".join(recipes))
        levels = self.min_levels
        legal = f"{len(self.scales)} numbers in [0, 1), one per scale of adapter.scales"
        fits = len(levels) == len(self.scales) and all(0 <= x < 1 for x in levels)
        require(fits, "adapter.min_levels", levels, legal)
        require(0 <= self.full_share < 1, "adapter.full_share", self.full_share, "[0, 1)")
        require(0 <= self.label_dropout < 1, "adapter.label_dropout", self.label_dropout, "[0, 1)")
        require(self.level_std > 0, "adapter.level_std", self.level_std, "> 0")
        require(
            set(self.trained) <= set(self.scales) and not (self.trained and not self.distils),
            "adapter.trained",
            self.trained,
            f"sizes of {self.scales}, with recipe 'lora' or 'distil'",
        )
        paired = len(self.stage_ends) == len(self.stage_modes)
        legal = f"{len(self.stage_modes)} numbers, one for each of adapter.stage_modes"
        require(paired, "adapter.stage_ends", self.stage_ends, legal)
        require(0 <= self.distil <= 1, "adapter.distil", self.distil, "[0, 1]")
        known = self.teacher_dtype in DTYPES
        require(known, "adapter.teacher_dtype", self.teacher_dtype, ", ".join(DTYPES))
        require(0 <= self.weak_fraction <= 1, "adapter.weak_fraction", self.weak_fraction, "[0, 1]")
        check_numbers(self, "adapter")

    @property
    def distils(self) -> bool:
        """Whether the frozen base teaches the new sizes."""
        return self.recipe in ("lora", "distil")

    def build(self) -> Method:
        """The method with these settings.

        Raises:
            ValueError: a value out of the method's range.
        """
        try:
            return self._method()
        except ValueError as error:
            fields = "stage_ends and stage_modes" if self.method in STAGED else "scales and rank"
            raise ValueError(f"{error} (adapter: {fields})") from error

    def _method(self) -> Method:
        scales = tuple(self.scales)
        if self.method == "sparsedit":
            return self.sparsedit(self.stage_ends, self.stage_modes, self.recipe, self.rank)
        if self.method == "ppflow":
            scales = [Mode.parse(name).patch_scale for name in self.stage_modes]
            stages = tuple(zip(self.stage_ends, scales, strict=True))
            return PPFlow(stages=stages, gains=tuple(self.gains), resize=self.resize)
        if self.method == "ddit":
            return DDiT(scales=scales, rank=self.rank, resize=self.resize)
        return FlexiDiT(recipe=self.recipe, scales=scales, rank=self.rank, resize=self.resize)


class AdapterTask:
    """Training of a patch-size adapter for a `DiTTransformer2DModel`."""

    find_unused_parameters = True

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.settings = settings = from_table(AdapterSettings, recipe.settings, "adapter")
        self.module: Any = open_base(settings.base, recipe, "adapter.base")
        method = settings.build()
        teaches = settings.distil > 0 and not settings.distils
        self.teacher = Teacher.of(self.module, settings.teacher_dtype) if teaches else None
        self.handle = elastify(self.module, self._start(method))
        self.shared = settings.recipe == "shared"
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(not settings.distils or self._trains(name))
        if self.shared:
            shared = self._shared_patches()
            shared.live = True
            for module in (self.module.pos_embed.proj, self.module.proj_out_2):
                module.requires_grad_(False)  # the underlying weights stand in for them

    @property
    def modes(self) -> list[tuple[Mode, float]]:
        """The modes to train, each with the noise level below which it is not."""
        settings, modes = self.settings, self.handle.method.modes
        chosen = zip(modes, settings.scales, settings.min_levels, strict=True)
        return [(m, low) for m, k, low in chosen if not settings.trained or k in settings.trained]

    def _start(self, method: Method) -> Method | Adapter:
        if not self.settings.init_from:
            return method
        adapter = Adapter.from_pretrained(self.settings.init_from)
        if adapter.method != method:
            raise ValueError(
                f"adapter.init_from = {self.settings.init_from!r} holds {adapter.method}; legal: "
                f"{method}, as the recipe says"
            )
        return replace(adapter, calibration=None)  # it would be one of the old weights

    def _trains(self, name: str) -> bool:
        """Whether a new parameter belongs to a mode that is trained."""
        if isinstance(self.handle.method, SparseDiT):
            return is_new(name)
        return is_new(name) and any(mode.name in name.split(".") for mode, _ in self.modes)

    @property
    def num_classes(self) -> int:
        """Labels are below it; the null label is it."""
        return self.module.config.num_embeds_ada_norm

    def to(self, device: torch.device) -> None:
        """Move the teacher, where it is another model."""
        if self.teacher is not None:
            self.teacher.model.to(device)

    def progress(self, share: float) -> None:
        """Every step is alike."""

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Distillation loss, or the base's objective in one randomly drawn mode."""
        method = self.handle.method
        if isinstance(method, SparseDiT):
            return self._denoise_one_stage(model, images, labels, generator, method)
        batch = self._noisy(images, labels, generator)
        if self.shared:
            return self._denoise(model, batch, generator)
        if isinstance(method, PPFlow):
            return self._denoise_by_stage(model, batch, method.default_schedule)
        return self._distil(model, batch)

    def _noisy(
        self,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        within: tuple[float, float] = (0.0, 1.0),
    ) -> NoisyBatch:
        return noisy_batch(
            images, labels, generator, self.settings, null_label=self.num_classes, within=within
        )

    def _teach(self, model: nn.Module, batch: NoisyBatch) -> Tensor:
        """The teacher's prediction: that of full mode, or of the base that was."""
        if self.teacher is not None:
            return self.teacher.predict(batch)
        with teaching(self.settings.teacher_dtype, batch.x.device):
            return self._predict(model, batch, FULL)

    def _denoise_one_stage(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        method: SparseDiT,
    ) -> Tensor:
        settings = self.settings
        stage = draw_stage(
            method,
            generator,
            mean=settings.level_mean,
            std=settings.level_std,
            random_grids=settings.random_grids,
        )
        batch = self._noisy(images, labels, generator, stage.within)
        error = self._errors(model, batch, stage.mode)
        return min_snr_weighted(error, batch, settings.min_snr_gamma).mean()

    def _errors(self, model: nn.Module, batch: NoisyBatch, mode: Mode) -> Tensor:
        """Squared errors ``(B, C, H, W)`` of a mode, against data and teacher."""
        share = 1.0 if self.settings.distils else self.settings.distil
        taught = self._teach(model, batch) if share else None
        return distilled(self._predict(model, batch, mode), batch.target, taught, share)

    def _distil(self, model: nn.Module, batch: NoisyBatch) -> Tensor:
        teacher = self._teach(model, batch)
        total = batch.x.new_zeros(())
        for mode, lowest in self.modes:
            keep = batch.noisier_than(lowest)
            student = self._predict(model, batch.where(keep), mode)
            total = total + (student - teacher[keep]).square().mean()
        return total

    def _denoise(self, model: nn.Module, batch: NoisyBatch, generator: torch.Generator) -> Tensor:
        modes = self.handle.method.modes
        draw = torch.rand((), generator=generator).item()
        mode, lowest = FULL, 0.0
        if draw >= self.settings.full_share:
            share = (draw - self.settings.full_share) / (1 - self.settings.full_share)
            index = int(share * len(modes))
            mode, lowest = modes[index], self.settings.min_levels[index]
        kept = batch.where(batch.noisier_than(lowest))
        return self._errors(model, kept, mode).mean()

    def _denoise_by_stage(self, model: nn.Module, batch: NoisyBatch, stages: Schedule) -> Tensor:
        total = batch.x.new_zeros(())
        for stage in stages.segments:
            above = batch.level >= stage.stop
            own = above & (batch.level < stage.start) if stage.start < 1 else above
            if own.any():
                total = total + self._errors(model, batch.where(own), stage.mode).sum()
        return total / batch.target.numel()

    def _predict(self, model: nn.Module, batch: NoisyBatch, mode: Mode) -> Tensor:
        with self.handle.using(mode):
            output = model(batch.x, timestep=batch.times, class_labels=batch.labels)
        return output.sample.float()

    def export(self, folder: Path, facts: dict[str, object]) -> None:
        """Save the adapter folder."""
        if self.shared:
            shared = self._shared_patches()
            shared.write_base(self.module, self.handle.backbone)
            shared.live = False
        if self.settings.method not in STAGED:
            self.handle.schedule = Schedule.weak_first(
                self.settings.weak_fraction, self.settings.scales[0]
            )
        notes = {"training": {"recipe": json.loads(self.recipe.to_json()), **facts}}
        self.handle.adapter(**notes).save_pretrained(folder)

    def _shared_patches(self) -> SharedPatches:
        engine = engine_of(self.module)
        assert engine is not None
        assert isinstance(engine.wiring.new, SharedPatches)
        return engine.wiring.new
