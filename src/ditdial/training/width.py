"""Train routed widths (DyDiT, 2410.03456) on a base's own objective.

Each step draws one of the widths and runs a pass with random gates, whose mean work is pulled to
the width (section 3.3). A full-width pass of the same weights keeps the beginning stable; towards
the end gates are drawn no more, so that what is trained is what will run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn

from ditdial.elastify import elastify
from ditdial.layers.width_pass import Narrow
from ditdial.methods import DyDiT
from ditdial.methods.dydit import RoutedModules
from ditdial.methods.routers import LEVELS, work_share
from ditdial.plain.checks import require
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.schedule import Schedule
from ditdial.runtime.model_class import engine_of
from ditdial.runtime.tensors import is_new
from ditdial.runtime.widths import Widths
from ditdial.training.config import Recipe, from_table
from ditdial.training.limits import AtMost, Level, check_numbers
from ditdial.training.objectives import NoisyBatch, noisy_batch
from ditdial.training.teacher import DTYPES, Teacher, distilled
from ditdial.training.trained_base import open_base

MOMENTUM = 0.98
"""Of the running shares of kept tokens, over steps."""


@dataclass(frozen=True, kw_only=True)
class WidthSettings:
    """Table ``[width]``.

    Args:
        base: folder of the trained base model.
        widths, recipe, scales, tokens, groups, rank, experts, head_bias, token_bias: of
            `ditdial.DyDiT`.
        budget_weight: of the squared distance from the width; 2 in the paper's code.
        ramp: share of the steps over which the target goes from 1 to the width.
        complete: share of the steps with the full-width pass beside; the paper's largest model has
            15 %.
        settle: share of the steps, at the end, without noise in the gates.
        distil: share of the loss that compares with the base's prediction instead of the data, in
            [0, 1]. A short training on the data alone loses some of the base's quality even with
            nothing left out.
        teacher_dtype: of the base's forward pass then; ``float32`` or ``bfloat16``.
        static: train nothing but the full-width pass, as long: the control that every routed model
            has to beat at its cost.
        level_mean, level_std: noise levels are drawn as ``sigmoid(mean + std * normal)``.
    """

    base: str
    widths: list[float] = field(default_factory=lambda: [0.5])
    recipe: str = "full"
    scales: list[int] = field(default_factory=list)
    tokens: bool = True
    groups: Annotated[int, AtMost(4096)] = 0
    rank: Annotated[int, AtMost(4096)] = 8
    experts: Annotated[int, AtMost(64)] = 4
    head_bias: float = 15.0
    token_bias: float = 35.0
    budget_weight: float = 2.0
    ramp: float = 0.1
    complete: float = 0.15
    settle: float = 0.2
    distil: float = 0.0
    teacher_dtype: str = "float32"
    static: bool = False
    label_dropout: float = 0.1
    level_mean: Level = 0.0
    level_std: Level = 1.0

    def __post_init__(self) -> None:
        for name in ("ramp", "complete", "settle", "distil"):
            require(0 <= getattr(self, name) <= 1, f"width.{name}", getattr(self, name), "[0, 1]")
        inside = all(0 < width < 1 for width in self.widths)
        require(inside, "width.widths", self.widths, "numbers in (0, 1)")
        # One group is always open, so that a single one would leave nothing to a router.
        require(self.groups != 1, "width.groups", self.groups, "0 for the default, or >= 2")
        require(self.budget_weight >= 0, "width.budget_weight", self.budget_weight, ">= 0")
        require(0 <= self.label_dropout < 1, "width.label_dropout", self.label_dropout, "[0, 1)")
        require(self.level_std > 0, "width.level_std", self.level_std, "> 0")
        known = self.teacher_dtype in DTYPES
        require(known, "width.teacher_dtype", self.teacher_dtype, ", ".join(DTYPES))
        legal = "0 with width.static: a base that nothing is taken from learns nothing from itself"
        require(not (self.static and self.distil), "width.distil", self.distil, legal)
        check_numbers(self, "width")

    def build(self) -> DyDiT:
        """The method with these settings.

        Raises:
            ValueError: a value out of the method's range.
        """
        return DyDiT(
            widths=tuple(self.widths),
            recipe=self.recipe,
            scales=tuple(self.scales),
            tokens=self.tokens,
            groups=self.groups,
            rank=self.rank,
            experts=self.experts,
            head_bias=self.head_bias,
            token_bias=self.token_bias,
        )


class WidthTask:
    """Training of routed widths for a `DiTTransformer2DModel`."""

    find_unused_parameters = True

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.settings = settings = from_table(WidthSettings, recipe.settings, "width")
        self.module: Any = open_base(settings.base, recipe, "width.base")
        self.teacher = Teacher.of(self.module, settings.teacher_dtype) if settings.distil else None
        self.method = settings.build()
        self.handle = elastify(self.module, self.method)
        self.works = {m: self.widths.works(self.module, m) for m in self.method.routed}
        self.share = 0.0
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(settings.recipe == "full" or is_new(name))

    @property
    def routed(self) -> RoutedModules:
        """The routers."""
        engine = engine_of(self.module)
        assert engine is not None
        assert isinstance(engine.wiring.new, RoutedModules)
        return engine.wiring.new

    @property
    def widths(self) -> Widths:
        """What the routers leave in."""
        engine = engine_of(self.module)
        assert engine is not None
        assert engine.surgery.widths is not None
        return engine.surgery.widths

    @property
    def num_classes(self) -> int:
        """Labels are below it; the null label is it."""
        return self.module.config.num_embeds_ada_norm

    def to(self, device: torch.device) -> None:
        """Move the teacher, where there is one."""
        if self.teacher is not None:
            self.teacher.model.to(device)

    def progress(self, share: float) -> None:
        """The target, the full-width pass and the noise depend on it."""
        self.share = share

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The base's objective in one randomly drawn routed mode, and the distance of its work."""
        settings = self.settings
        batch = noisy_batch(images, labels, generator, settings, null_label=self.num_classes)
        if settings.static:
            return self._error(model, batch, FULL)
        taught = None if self.teacher is None else self.teacher.predict(batch)
        modes = self.method.routed
        mode = modes[int(torch.randint(len(modes), (), generator=generator))]
        noisy = self.share < 1 - settings.settle
        self.routed.gated, self.routed.drawing = True, generator if noisy else None
        try:
            total = self._error(model, batch, mode, taught)
            narrow = self.widths.last
        finally:
            self.routed.gated, self.routed.drawing = False, None
        if torch.is_grad_enabled():  # not where finished weights are judged
            self._record(mode, narrow, batch.level)
        total = total + settings.budget_weight * (self._work(mode, narrow) - self._aim(mode)) ** 2
        if self.share < settings.complete:
            total = total + self._error(model, batch, mode.patch, taught)
        return total

    def _error(
        self, model: nn.Module, batch: NoisyBatch, mode: Mode, taught: Tensor | None = None
    ) -> Tensor:
        with self.handle.using(mode):
            output = model(batch.x, timestep=batch.times, class_labels=batch.labels)
        student = output.sample.float()
        return distilled(student, batch.target, taught, self.settings.distil).mean()

    def _work(self, mode: Mode, narrow: Narrow) -> Tensor:
        """Mean share of the work over all pictures of all processes, before it is squared."""
        mean = work_share(narrow, self.works[mode]).mean()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            mean = dist_nn.all_reduce(mean) / dist.get_world_size()
        return mean

    def _aim(self, mode: Mode) -> float:
        ramp = self.settings.ramp
        done = 1.0 if ramp == 0 else min(1.0, self.share / ramp)
        return 1 - (1 - mode.width) * done

    @torch.no_grad()
    def _record(self, mode: Mode, narrow: Narrow, level: Tensor) -> None:
        """Keep running shares of the tokens that each block keeps, by noise level."""
        routers: Any = self.routed.routers[mode.name]
        table: Tensor = routers.token_shares
        bins = (level * LEVELS).long().clamp(max=LEVELS - 1)
        for block, share in narrow.token_shares.items():
            for place in bins.unique().tolist():
                mean = torch.as_tensor(share)[bins == place].mean()
                table[block, place].lerp_(mean, 1 - MOMENTUM)

    def export(self, folder: Path, facts: dict[str, object]) -> None:
        """Save the adapter folder."""
        if not self.settings.static:
            self.handle.schedule = Schedule.constant(self.method.routed[0])
        notes = {"training": {"recipe": json.loads(self.recipe.to_json()), **facts}}
        self.handle.adapter(**notes).save_pretrained(folder)
