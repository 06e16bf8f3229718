"""One verb in, one verb out: `elastify` changes a model, `Handle.remove` undoes it exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ditdial.adapter import Adapter, Composition, check_base, load_adapter
from ditdial.backbones import Backbone, backbone_for
from ditdial.handle import Handle, check_modes
from ditdial.host.pickling import Weak
from ditdial.host.pipelines import transformers
from ditdial.layers.swap import check_forward
from ditdial.methods import Method
from ditdial.plan.schedule import Schedule
from ditdial.runtime.engine import Engine
from ditdial.runtime.model_class import ENGINE

Source = str | Path | Adapter | Method
"""A trained adapter (folder, hub id or object), or a method to start one."""


def elastify(
    target: Any,
    adapter: Source | Sequence[Source],
    *,
    component: str | None = None,
    schedule: Schedule | None = None,
    merge: bool = False,
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
        merge: keep one more copy of the adapted weights per mode, so that coarse modes pay nothing
            for low-rank updates; equal but for rounding.

    Returns:
        The handle that owns every change. An elastic model that is made elastic again is first
        restored.

    Raises:
        ValueError: unsupported class, adapter of another base, damaged adapter, mode that does not
            fit, a component that is missing or not named, parts that cannot be combined. Nothing
            has been changed then.
        FileNotFoundError: no such adapter.
    """
    model, pipe = _resolve(target, component)
    backbone = backbone_for(model)
    sources = [adapter] if isinstance(adapter, Source) else adapter
    parts = [x if isinstance(x, Adapter | Method) else load_adapter(x) for x in sources]
    composition = Composition.of(parts)
    method, adapters = composition.method, composition.adapters
    for single in method.singles:
        backbone.check(model, set(single.modes))
        _check_method(model, backbone, single)
    for loaded in adapters:
        check_base(loaded, backbone.identity(model))
    schedule = schedule or composition.schedule
    check_modes(model, backbone, method, schedule.modes, "schedule")
    previous: Engine | None = model.__dict__.get(ENGINE)
    if previous:
        previous.uninstall(model)
    else:
        check_forward(model)
    try:
        engine = Engine.build(model, backbone, method, adapters)
    except Exception:
        if previous:
            previous.install(model)
        raise
    engine.schedule, engine.router.merged = schedule, merge
    engine.calibration = next((x.calibration for x in adapters if x.method == method), None)
    engine.install(model)
    if pipe is not None:
        engine.timeline.pipe = Weak(pipe)
    return Handle(model, engine)


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
    engine: Engine | None = model.__dict__.get(ENGINE)
    if engine is None:
        return None
    if pipe is not None and engine.timeline.pipe_of(model) is None:  # the pipeline itself is a copy
        engine.timeline.pipe = Weak(pipe)
    return Handle(model, engine)


def stock_class(model: nn.Module) -> type:
    """The diffusers class of a model, elastic or not."""
    engine = model.__dict__.get(ENGINE)
    return type(model) if engine is None else engine.surgery.stock


def _resolve(target: Any, component: str | None) -> tuple[nn.Module, Any]:
    """The transformer to change, and the pipeline if it was given one."""
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


def _check_method(model: nn.Module, backbone: Backbone, method: Method) -> None:
    layers = backbone.adapting(method.adapts).low_rank_layers(model)
    if method.low_rank and not any(True for _ in layers):
        raise ValueError(
            f"method {method.name!r} adapts feed-forward layers, and those of "
            f"{backbone.model_class} are not linear; legal: a method that adapts attention too"
        )
    if method.conditions and not any(True for _ in backbone.conditioning_layers(model)):
        raise ValueError(
            f"method {method.name!r} marks the conditioning vector, and none is known of "
            f"{backbone.model_class}; legal: a method that marks tokens (flexidit, ddit)"
        )
