"""Step caches that others put on a model: what each needs to go together with coarse modes.

diffusers' caches keep their state by the name of a ``cache_context``; a name of its own for each
mode and branch keeps sizes apart. cache-dit puts another list of blocks in the place of the model's
while a call runs; it has one state, and computes anew when it sees another size.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from ditdial.plan.mode import Mode

BY_CONTEXT = ("FirstBlockCache", "MagCache", "SeaCache", "TaylorSeerCache")
"""Step caches of diffusers whose state can be kept per branch and mode."""

ALL_ROWS = ""
"""Branch of a forward pass over all rows of a call."""

NO_ROWS = "/none"
"""Branch of a call that only repeats a prediction."""


def has_step_cache(model: nn.Module) -> bool:
    """Whether a step cache of diffusers or cache-dit is on a model."""
    return bool(getattr(model, "is_cache_enabled", False)) or _cache_dit(model) is not None


def state(
    model: Any,
    stock: Any,
    context: tuple[str, dict[str, Any]] | None,
    mode: Mode,
    branch: str,
    *,
    alone: bool,
) -> contextlib.AbstractContextManager[None]:
    """The state of a diffusers cache that belongs to a mode and branch.

    Args:
        context: name and facts of the ``cache_context`` that the pipeline has opened.
        branch: which rows of a batched call run by themselves.
        alone: whether no other mode comes in the same run.

    Raises:
        RuntimeError: the cache in use has one state for all patch sizes.
    """
    if not getattr(model, "is_cache_enabled", False):
        return contextlib.nullcontext()
    cache = type(model._cache_config).__name__.removesuffix("Config")
    if not mode.is_full and cache not in BY_CONTEXT and not (alone and branch == ALL_ROWS):
        raise RuntimeError(
            f"{cache} keeps one state for all patch sizes; legal together with mode "
            f"{mode.name!r}: {', '.join(BY_CONTEXT)}, or a schedule of this mode alone"
        )
    if context is None:
        return contextlib.nullcontext()
    name, facts = context
    return stock.cache_context(model, f"{name}@{mode.name}{branch}", **facts)


def check_sparse(model: nn.Module, mode: Mode) -> None:
    """Refuse caches that skip blocks between which tokens change grids.

    Raises:
        RuntimeError: a sparse mode together with a step cache.
    """
    if mode.is_sparse and has_step_cache(model):
        raise RuntimeError(
            f"a step cache skips blocks, and in mode {mode.name!r} tokens change grids between "
            "them; legal together with it: full mode"
        )


def check_cache_dit(model: Any, mode: Mode, branch: str, *, reads_blocks: bool) -> None:
    """Refuse what cache-dit would get wrong.

    Args:
        branch: which rows of a batched call run by themselves.
        reads_blocks: the stock forward looks into its blocks or counts them.

    Raises:
        RuntimeError: naming the setting, and what is legal.
    """
    manager = _cache_dit(model)
    if manager is None:
        return
    if reads_blocks:
        raise RuntimeError(
            f"cache-dit hides the blocks of {type(model).__name__}, whose forward looks into them "
            "or counts them; legal: cache_dit.disable_cache, or a stock model"
        )
    if branch != ALL_ROWS:
        raise RuntimeError(
            "cache-dit counts one pass of all rows through the blocks per call, and this schedule "
            "makes none or several; legal together with it: one mode for all rows, gain 1"
        )
    if mode.is_full:
        return
    for context in manager._cached_context_manager.values():
        config = context.cache_config
        static = config.steps_computation_policy == "static"
        if config.steps_computation_mask is not None and static:
            raise RuntimeError(
                "cache-dit with steps_computation_policy = 'static' keeps one state for all patch "
                f"sizes; legal together with mode {mode.name!r}: 'dynamic'"
            )
        if config.residual_diff_threshold >= 1:
            raise RuntimeError(
                f"cache-dit with residual_diff_threshold = {config.residual_diff_threshold} does "
                f"not look at sizes; legal together with mode {mode.name!r}: below 1"
            )


def _cache_dit(model: Any) -> Any:
    """What holds cache-dit's states of a model, if it is on it."""
    manager = model.__dict__.get("_context_manager") if "_is_cached" in model.__dict__ else None
    return manager if type(manager).__module__.startswith("cache_dit.") else None
