"""Position tables that are made once for each grid and mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from elastic_dit.mode import Mode
from elastic_dit.routing import Router


def kept_table(router: Router, mode: Mode, make: Callable[[], Tensor]) -> Tensor:
    """The table ``(n, D)`` that ``make`` returns, as ``(1, n, D)`` of single precision."""
    key = (router.grid, mode.patch_scale, router.device)
    if key not in router.tables:
        table = make()[None].float().to(router.device)
        if torch.compiler.is_compiling():  # belongs to the graph
            return table
        router.tables[key] = table
    return router.tables[key]
