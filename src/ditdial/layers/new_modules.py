"""The modules that a method adds to a model: what makes and ends the tokens of its modes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ditdial.backbones.base import Backbone
from ditdial.layers.state import State
from ditdial.layers.token_grids import TokenGrids
from ditdial.layers.width_pass import Routing
from ditdial.ops.patching import Triple
from ditdial.plan.mode import Mode


class Hook(NamedTuple):
    """A hook for a module of the base.

    Attributes:
        run: as `torch.nn.Module.register_forward_pre_hook` takes it, with named arguments; as
            ``register_forward_hook`` does, if it is to run ``behind`` the module's ``forward``.
        attributes: that the module needs for it.
        follows: it belongs to the place, whichever module is there.
    """

    module: nn.Module
    run: Callable[..., Any]
    behind: bool = False
    attributes: Mapping[str, Any] = {}
    follows: bool = False


class NewModules(nn.Module, ABC):
    """The parameters of a method that belong to no module of the base.

    They are attached to the model as ``elastic``, so that their tensors travel with the model's
    state dict.
    """

    @property
    def routing(self) -> Routing | None:
        """What says which heads, channels and tokens routed modes leave in, if there are any."""
        return None

    @property
    def corners(self) -> bool:
        """Whether coarse tokens have the positions of the first tokens of their groups."""
        return False

    def of(self, method: str) -> NewModules:
        """Those of one of the methods that they are made of, by name."""
        return self

    @abstractmethod
    def makes_tokens(self, mode: Mode) -> bool:
        """Whether this mode's tokens are made here rather than by the stock modules.

        True of coarse modes; and of full mode while the one weight of all patch sizes is trained
        (FlexiDiT's shared recipe). Modes with token grids and routed modes at the base's patch size
        leave the making of tokens to the stock modules.
        """

    def ready(self, mode: Mode) -> None:
        """Make what is kept between passes; called before each pass whose tokens are made here."""
        return

    @abstractmethod
    def embed(self, vectors: Tensor, mode: Mode) -> Tensor:
        """Base patch vectors ``(B, T, H, W, c)`` -> tokens ``(B, n, D)`` without positions.

        Ragged borders of the grid are filled by repetition, so ``n`` counts whole groups.
        """

    @abstractmethod
    def project(self, hidden: Tensor, mode: Mode, grid: Triple) -> Tensor:
        """Final hidden states ``(B, n, D)`` -> base patch vectors ``(B, T*H*W, c_out)``.

        Args:
            grid: base grid of one row of ``hidden``; what was filled up at its borders is cut off.
        """

    def hooks(self, model: nn.Module) -> Iterable[Hook]:
        """Hooks for modules of the model, which find the pass by `ditdial.layers.wiring`."""
        return ()

    def grids(
        self, model: nn.Module, backbone: Backbone, state: State, mode: Mode
    ) -> TokenGrids | None:
        """The token grids of a pass in a sparse mode."""
        return None

    def condition(self, vector: Tensor, mode: Mode) -> Tensor:
        """The conditioning vector ``(B, D)`` of a mode, from the base's."""
        return vector
