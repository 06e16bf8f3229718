"""The modules that a method adds to a model: what makes and ends the tokens of its modes."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ditdial.backbones.base import Backbone
from ditdial.layers.state import State
from ditdial.layers.token_grids import TokenGrids
from ditdial.layers.width_pass import Routing
from ditdial.ops.patching import Triple
from ditdial.plan.mode import Mode


class NewModules(nn.Module, ABC):
    """The parameters of a method that belong to no module of the base.

    They are attached to the model as ``elastic``, so that their tensors travel with the model's
    state dict.
    """

    @property
    def routing(self) -> Routing | None:
        """What says which heads, channels and tokens routed modes leave in, if there are any."""
        return None

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

    def attach(self, model: nn.Module) -> list[tuple[nn.Module, RemovableHandle]]:
        """Put hooks on modules of the model, which find the pass by `ditdial.layers.wiring`.

        Returns:
            The modules, and what takes their hooks off again.
        """
        return []

    def grids(
        self, model: nn.Module, backbone: Backbone, state: State, mode: Mode
    ) -> TokenGrids | None:
        """The token grids of a pass in a sparse mode."""
        return None

    def condition(self, vector: Tensor, mode: Mode) -> Tensor:
        """The conditioning vector ``(B, D)`` of a mode, from the base's."""
        return vector
