"""What every method has: a config, the modules it adds, and how they start."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

from torch import nn

from ditdial.backbones.base import Backbone
from ditdial.cost.shape import TransformerShape, Updates
from ditdial.layers.new_modules import NewModules
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.schedule import Schedule


class Method(ABC):
    """One published system: its configuration and what it adds to a base.

    Attributes:
        name: key in `ditdial.methods.METHODS` and in adapter files.
        paper: where it comes from.
        recipes: ways to train it.
        adapts: which of the backbone's layers carry low-rank updates: a regular expression that
            their names match.
        conditions: whether coarse modes change the conditioning vector.
        skips: whether coarse modes have a path from the base patch vectors to the output's.
        packs: whether branches of different modes may share one packed call, where the class can.
    """

    name: str
    paper: str
    recipes: tuple[str, ...]
    adapts: str = ""
    conditions: bool = False
    skips: bool = False
    packs: bool = True

    @property
    def singles(self) -> tuple[Method, ...]:
        """The published systems it consists of: itself, where it is no combination."""
        return (self,)

    @property
    @abstractmethod
    def modes(self) -> tuple[Mode, ...]:
        """The coarse modes it adds."""

    def has(self, mode: Mode) -> bool:
        """Whether it can run a mode."""
        return mode in (FULL, *self.modes)

    @property
    @abstractmethod
    def low_rank(self) -> int:
        """Rank of the low-rank updates of self-attention and feed-forward; 0 for none."""

    @property
    @abstractmethod
    def trains_base(self) -> bool:
        """Whether the base's own weights are trained, hence part of the adapter."""

    @property
    def default_schedule(self) -> Schedule:
        """What a fresh method runs with."""
        return Schedule.constant(FULL)

    def schedule_for(self, model: nn.Module, backbone: Backbone, pipe: Any) -> Schedule:
        """What a fresh method runs with on a model; its `default_schedule` on most.

        Args:
            pipe: that the model is part of; None for a bare one.
        """
        return self.default_schedule

    def priced(
        self, shape: TransformerShape, model: nn.Module, backbone: Backbone
    ) -> TransformerShape:
        """What the cost of a model depends on, with what the method changes in the blocks' work."""
        return shape

    def updates(self, model: nn.Module, backbone: Backbone) -> tuple[Updates, ...]:
        """What its low-rank updates cost in a model."""
        if not self.low_rank:
            return ()
        layers = backbone.adapting(self.adapts).low_rank_layers(model)
        blocks = backbone.block_terms(model, {name for name, _ in layers})
        parts = frozenset(mode.name for mode in self.modes)
        return (Updates(rank=self.low_rank, blocks=blocks, parts=parts),)

    def shape(
        self,
        model: nn.Module,
        backbone: Backbone,
        size: tuple[Any, ...],
        *,
        merged: bool = False,
    ) -> TransformerShape:
        """What the cost of a model with this method depends on.

        Args:
            size: base grid and text tokens, as `Backbone.size` returns them.
            merged: low-rank updates are added to the weights beforehand.
        """
        shape = self.priced(backbone.shape(model, *size), model, backbone)
        updates = () if merged else self.updates(model, backbone)
        return replace(shape, updates=updates, patches=replace(shape.patches, skips=self.skips))

    @abstractmethod
    def build(self, model: nn.Module, backbone: Backbone) -> NewModules:
        """New parameters for a base, initialised from it."""

    def check_loaded(self, new: NewModules) -> None:
        """Refuse numbers of an adapter that nothing can be computed with.

        Raises:
            ValueError: naming the tensor and what is legal.
        """
        return

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Plain data; the class's constructor takes it back."""
