"""What a backbone may read of the present forward pass.

Backbones lie below the layers that switch modes, so that they know a pass by these few facts alone;
`ditdial.layers.state.State` adds what concerns the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditdial.ops.patching import Triple, coarse_grid
from ditdial.plan.mode import FULL, Mode

WIRING = "_ditdial_wiring"
"""Attribute of a module that took part in a surgery; its ``state`` is the `Forward`."""

Embed = Callable[[Tensor], Tensor]
"""Base patch vectors ``(B, T, H, W, c)`` -> tokens ``(B, n, D)`` of the present mode."""

Project = Callable[[Tensor, Triple], Tensor]
"""Hidden states ``(B, n, D)`` and their base grid -> base patch vectors ``(B, T*H*W, c_out)``."""


@dataclass(eq=False)
class Forward:
    """Plain state of one forward pass, set outside any compiled region.

    Attributes:
        patch: latent frames, rows and columns of one base token.
        mode: of the pass, when all rows share one.
        grid: base grid ``(frames, height, width)`` of the call.
        makes_tokens: whether new modules make the pass's tokens, instead of the stock ones.
        corners: positions of coarse tokens are those of the first tokens of their groups, instead
            of the centres.
        device: of the latent; weights may be elsewhere until their module's hooks bring them.
        lengths: of the text and of the whole sequence of each row, where a class joins them row by
            row.
        constants: tensors that are kept from pass to pass, see `constant`.
    """

    patch: Triple = (1, 1, 1)
    mode: Mode = FULL
    grid: Triple = (1, 0, 0)
    makes_tokens: bool = False
    corners: bool = False
    device: Any = None
    lengths: tuple[list[int], list[int]] | None = None
    constants: dict[Any, Tensor] = field(default_factory=dict)

    def tokens(self, mode: Mode) -> int:
        """Tokens of one picture of the present grid in a mode.

        Ragged borders count as whole groups: 7 x 5 base tokens are 4 x 3 at scale 2.
        """
        return math.prod(coarse_grid(self.grid, mode.patch_scale))

    def constant(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that only ``key`` decides, made once for each device.

        Args:
            key: hashable, and all that the tensor depends on beside the device.
            make: makes it, on any device.
        """
        key = key, self.device
        if key not in self.constants:
            if torch.compiler.is_compiling():  # it belongs to the graph
                return make().to(self.device)
            with torch.inference_mode(False):  # it may be trained with later
                self.constants[key] = make().to(self.device)
        return self.constants[key]

    def position_table(self, mode: Mode, make: Callable[[], Tensor]) -> Tensor:
        """The table ``(n, D)`` that ``make`` returns, as ``(1, n, D)`` of single precision."""
        return self.constant((self.grid, mode.patch_scale), lambda: make()[None].float())


def forward_of(module: nn.Module) -> Forward:
    """The present forward pass, for a hook that a surgery has put on a module."""
    return module.__dict__[WIRING].state
