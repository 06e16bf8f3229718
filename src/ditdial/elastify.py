"""One verb in, one verb out: `elastify` changes a model, `Handle.remove` undoes it exactly.

What is done to the model itself is `ditdial.runtime.model_class.make_elastic`; this file finds the
transformer of a pipeline and reads adapters from folders or the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ditdial.adapter import Adapter
from ditdial.handle import Handle
from ditdial.host.pickling import Weak
from ditdial.host.pipelines import transformers
from ditdial.methods import METHODS, Method
from ditdial.plain.checks import require
from ditdial.plain.kinds import check_kind
from ditdial.plan.execution import Execution
from ditdial.plan.schedule import Schedule
from ditdial.runtime.engine import Engine
from ditdial.runtime.model_class import engine_of, make_elastic

Source = str | Path | Adapter | Method
"""A trained adapter (folder, hub id or object), or a method to start one."""


def elastify(
    target: Any,
    adapter: Source | Sequence[Source],
    *,
    component: str | None = None,
    schedule: Schedule | None = None,
    execution: Execution | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Handle:
    """Make a diffusers pipeline or transformer elastic, in place.

    Args:
        target: a pipeline with a ``transformer``, or the transformer itself.
        adapter: a trained adapter (folder, hub id or object), or a method to start one from the
            base's weights; several of either that change different things are combined (see
            `ditdial.methods.combined`).
        component: which transformer of a pipeline with two (Wan 2.2), ``transformer`` or
            ``transformer_2``; each has a handle of its own. The only one by default.
        schedule: replaces the adapter's default; a method starts with full mode throughout, and
            so does a combination, unless a part of it has retrained the base's weights.
        execution: how calls are run, as ``Execution(merge=True)``.
        revision, token: of adapters that come from the hub, as `Adapter.from_pretrained` takes
            them.

    Returns:
        The handle that owns every change. An elastic model that is made elastic again is first
        restored.

    Raises:
        ValueError: unsupported class, adapter of another base, damaged adapter, mode that does not
            fit, a component that is missing or not named, parts that cannot be combined. Nothing
            has been changed then.
        FileNotFoundError: no such adapter.
    """
    legal = "a Schedule, or None for the adapter's own"
    require(schedule is None or isinstance(schedule, Schedule), "schedule", schedule, legal)
    legal = "an Execution, as Execution(merge=True)"
    require(execution is None or isinstance(execution, Execution), "execution", execution, legal)
    model, pipe = _resolve(target, component)
    parts = [_loaded(source, revision, token) for source in _sources(adapter)]
    engine = make_elastic(model, parts, schedule=schedule, execution=execution, pipe=pipe)
    return _handle(model, engine, pipe)


def handle_of(target: Any, *, component: str | None = None) -> Handle | None:
    """The handle of an elastic pipeline or model (a copy of one included), or None.

    A copied pipeline, or one from another process, should be given here once: guidance branches
    that are called one by one are told apart by what the pipeline shows of its run.

    Args:
        component: which transformer of a pipeline with two.

    Raises:
        ValueError: a component that is missing or not named.
    """
    model, pipe = _resolve(target, component)
    engine = engine_of(model)
    if engine is None:
        return None
    known = engine.position.pipe_of(model) is not None
    return _handle(model, engine, None if known else pipe)  # else the pipeline itself is a copy


def stock_class(model: nn.Module) -> type:
    """The diffusers class of a model, elastic or not."""
    engine = engine_of(model)
    return type(model) if engine is None else engine.surgery.stock


def _handle(model: nn.Module, engine: Engine, pipe: Any) -> Handle:
    """The handle of an elastic model that is called by a pipeline from now on."""
    if pipe is not None:
        engine.position.pipe = Weak(pipe)
    return Handle(model, engine)


def _resolve(target: Any, component: str | None) -> tuple[nn.Module, Any]:
    """The transformer to change, and the pipeline if it was given one."""
    check_kind("component", component, str | None)
    if isinstance(target, nn.Module):
        if component is not None:
            raise ValueError(f"component = {component!r}; legal for a bare model: None")
        return getattr(target, "_orig_mod", target), None
    models, name = transformers(target), type(target).__name__
    if not models:
        raise ValueError(f"{name} has no transformer; legal: a diffusers DiT pipeline or its model")
    if component is None and len(models) == 1:
        (component,) = models
    if component not in models:
        legal = ", ".join(map(repr, models))
        raise ValueError(f"component = {component!r}; legal for this {name}: {legal}")
    return models[component], target


def _sources(adapter: Source | Sequence[Source]) -> list[Source]:
    """What was given, one by one.

    Raises:
        ValueError: something that is no source.
    """
    sources: list[Any] = list(adapter) if isinstance(adapter, list | tuple) else [adapter]
    legal = f"an adapter (folder, hub id or object), or a method ({', '.join(METHODS)})"
    for source in sources:
        if isinstance(source, type) and issubclass(source, Method):
            legal = f"an object of the class, {source.__name__}()"
        require(isinstance(source, Source), "adapter", source, legal)
    return sources


def _loaded(source: Source, revision: str | None, token: str | bool | None) -> Adapter | Method:
    if isinstance(source, Adapter | Method):
        return source
    return Adapter.from_pretrained(source, revision=revision, token=token)
