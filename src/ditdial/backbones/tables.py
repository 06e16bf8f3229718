"""Position tables that are made once for each grid and mode."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ditdial.layers.state import Router
from ditdial.plan.mode import Mode


def kept_table(router: Router, mode: Mode, make: Callable[[], Tensor]) -> Tensor:
    """The table ``(n, D)`` that ``make`` returns, as ``(1, n, D)`` of single precision."""
    return router.constant((router.grid, mode.patch_scale), lambda: make()[None].float())
