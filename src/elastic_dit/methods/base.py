"""What every method has: a config, the modules it adds, and how they start."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from elastic_dit.backbones.base import Backbone
from elastic_dit.cost import Updates
from elastic_dit.mode import FULL, Mode
from elastic_dit.ops.patching import Triple
from elastic_dit.schedule import Schedule

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from elastic_dit.cost import TransformerShape
    from elastic_dit.methods.dydit import RoutedSizes
    from elastic_dit.routing import Router
    from elastic_dit.streams import Streams


class Sizes(nn.Module, ABC):
    """The parameters of a method that belong to no module of the base.

    It is attached to the model as ``elastic`` so that its tensors travel with the model's state
    dict.
    """

    @property
    def routed(self) -> RoutedSizes | None:
        """Those that say what routed modes leave out, if there are any."""
        return None

    def of(self, single: Method) -> Sizes:
        """The parameters of one of the method's `Method.singles`."""
        return self

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

    def attach(self, model: nn.Module, router: Router) -> list[tuple[nn.Module, RemovableHandle]]:
        """Put hooks on modules of the model, which find the router in ``module.__dict__[ROUTER]``.

        Returns:
            The modules, and what takes their hooks off again.
        """
        return []

    def begin(self, model: nn.Module, router: Router, mode: Mode) -> Streams | None:
        """State of one forward pass in a mode, where its hooks need one."""
        return None

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

    def priced(
        self, shape: TransformerShape, model: nn.Module, backbone: Backbone
    ) -> TransformerShape:
        """What the cost of a model depends on, with what the method changes in its blocks."""
        return shape

    def updates(
        self,
        shape: TransformerShape,
        model: nn.Module,
        backbone: Backbone,
        size: tuple[Any, ...],
    ) -> tuple[Updates, ...]:
        """What its low-rank updates cost in a model.

        Args:
            shape: of the model, with what sparse and routed modes change in its blocks.
            size: base grid and text tokens, as `Backbone.size` returns them.
        """
        if not self.low_rank:
            return ()
        backbone = backbone.adapting(self.adapts)
        whole, layers = backbone.shape(model, *size), dict(backbone.low_rank_layers(model))
        units = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
        own, streamed = set(layers.values()), backbone.streamed if shape.sparse else None
        blocks = backbone.routed_blocks(model) if shape.routable else ()
        return (
            Updates(
                rank=self.low_rank,
                units=whole.adapted,
                text_units=whole.adapted_text,
                modes=frozenset(mode.name for mode in self.modes),
                blocks=() if streamed is None else tuple(streamed.adapted(model, units)),
                routed=tuple(block.adapted(own) for block in blocks),
            ),
        )

    @abstractmethod
    def build(self, model: nn.Module, backbone: Backbone) -> Sizes:
        """New parameters for a base, initialised from it."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Plain data; the class's constructor takes it back."""
