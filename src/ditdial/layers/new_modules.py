"""The parameters that a method adds to a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ditdial.ops.patching import Triple
from ditdial.plan.mode import Mode

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ditdial.layers.state import Router
    from ditdial.layers.token_grids import Streams
    from ditdial.methods.base import Method
    from ditdial.methods.dydit import RoutedSizes


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
