"""What every method has: a config, the modules it adds, and how they start."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from elastic_dit.backbones.base import Backbone
from elastic_dit.mode import FULL, Mode
from elastic_dit.ops.patching import Triple
from elastic_dit.schedule import Schedule


class Sizes(nn.Module, ABC):
    """The parameters of a patch-size method that belong to no module of the base.

    It is attached to the model as ``elastic`` so that its tensors travel with the model's state
    dict.
    """

    @abstractmethod
    def routes(self, mode: Mode) -> bool:
        """Whether this mode's tokens are made here rather than by the stock modules."""

    def ready(self, mode: Mode) -> None:
        """Make what is kept between calls; called before each forward pass of a routed mode."""
        return

    @abstractmethod
    def embed(self, vectors: Tensor, mode: Mode) -> Tensor:
        """Base patch vectors ``(B, T, H, W, c)`` -> tokens ``(B, n, D)`` without positions."""

    @abstractmethod
    def project(self, hidden: Tensor, mode: Mode, grid: Triple) -> Tensor:
        """Final hidden states ``(B, n, D)`` -> base patch vectors ``(B, T*H*W, c_out)``."""

    def condition(self, vector: Tensor, mode: Mode) -> Tensor:
        """The conditioning vector ``(B, D)`` of a mode, from the base's."""
        return vector


class Method(ABC):
    """One published system: its configuration and what it adds to a base.

    Attributes:
        name: key in `elastic_dit.methods.METHODS` and in adapter files.
        paper: where it comes from.
        recipes: ways to train it.
        adapts: which of the backbone's layers carry low-rank updates: a regular expression that
            their names match.
        conditions: whether coarse modes change the conditioning vector.
        skips: whether coarse modes have a path from the base patch vectors to the output's.
        narrows: whether its modes leave out heads, channels or tokens.
    """

    name: str
    paper: str
    recipes: tuple[str, ...]
    adapts: str = ""
    conditions: bool = False
    skips: bool = False
    narrows: bool = False

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

    @abstractmethod
    def build(self, model: nn.Module, backbone: Backbone) -> Sizes:
        """New parameters for a base, initialised from it."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Plain data; the class's constructor takes it back."""
