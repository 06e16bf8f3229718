"""The class of an elastic model: a generated subclass whose calls go through its engine.

The stock names go into saved configs and are what caches and loaders look for, so that the
subclass has the name and module of the stock class and is equal to it.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditdial.adapter import Adapter, Composition, check_base
from ditdial.backbones import Backbone, backbone_for
from ditdial.backbones.base import Rewired
from ditdial.backbones.forward import WIRING
from ditdial.host.device_map import dispatch, offloads, without_places
from ditdial.host.loras import CHANGING
from ditdial.host.pickling import MADE_OF, pickled_as
from ditdial.layers.swap import check_forward, rebind_hooks
from ditdial.methods import LowBand, Method
from ditdial.plain.checks import did_you_mean
from ditdial.plan.execution import Execution
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.schedule import Schedule
from ditdial.runtime.compiled import unseen
from ditdial.runtime.engine import Engine
from ditdial.runtime.tensors import NEW

ENGINE = "_ditdial_engine"
"""Attribute of an elastic model that holds its engine."""

FOLDER = "elastic.adapter"
"""Folder of the adapter in a saved model. What reads such folders splits all names at the dot."""


def engine_of(model: nn.Module) -> Engine | None:
    """The engine of an elastic model; None for a stock one."""
    return model.__dict__.get(ENGINE)


def make_elastic(
    model: nn.Module,
    sources: Sequence[Adapter | Method],
    *,
    schedule: Schedule | None = None,
    execution: Execution | None = None,
    pipe: Any = None,
) -> Engine:
    """Make a model elastic, in place; an elastic one is first restored.

    Args:
        sources: trained adapters, and methods that start from the base's weights.
        schedule: replaces the adapters' default.
        pipe: that the model is part of; None for a bare one.

    Raises:
        ValueError: unsupported class, adapter of another base, mode that does not fit, parts that
            cannot be combined. Nothing has been changed then.
    """
    backbone = backbone_for(model)
    composition = Composition.of(sources)
    method, adapters = composition.method, composition.adapters
    for single in method.singles:
        backbone.check(model, set(single.modes))
        _check_method(model, backbone, single)
    for loaded in adapters:
        check_base(loaded, backbone.identity(model))
    told = schedule or composition.schedule
    schedule = told or method.schedule_for(model, backbone, pipe)
    check_modes(model, backbone, method, schedule.modes, "schedule")
    previous = engine_of(model)
    if previous is None:
        check_forward(model)
    else:
        uninstall(model)  # new modules start from the base's weights, which must be in place
    try:
        engine = Engine.build(model, backbone, method, adapters)
        engine.execution = execution or Execution()
        if previous is not None:  # the scales that LoRAs were fused at: PEFT does not keep them
            engine.surgery.tensors.present = previous.surgery.tensors.present
    except Exception:
        if previous is not None:
            install(model, previous)
        raise
    own = (adapter.calibration for adapter in adapters if adapter.method == method)
    engine.chooser.schedule, engine.chooser.calibration = schedule, next(own, None)
    engine.chooser.by_rule = told is None and schedule.modes != {FULL}
    install(model, engine)
    return engine


def check_modes(
    model: nn.Module, backbone: Backbone, method: Method, modes: set[Mode], who: str
) -> None:
    """Refuse modes that an adapter or its model lacks.

    Args:
        who: asks for them.

    Raises:
        ValueError: naming them, and the legal ones.
    """
    unknown = sorted(mode.name for mode in modes if not method.has(mode))
    if unknown:
        fitting = (mode.name for mode in method.modes if backbone.fits(model, mode))
        names = ", ".join(["full", *fitting])
        near = did_you_mean(unknown[0], names.split(", "))
        raise ValueError(
            f"{who} asks for {', '.join(unknown)}; legal for this adapter: {names}{near}"
        )
    backbone.check(model, modes)


def _check_method(model: nn.Module, backbone: Backbone, method: Method) -> None:
    layers = backbone.adapting(method.adapts).low_rank_layers(model)
    if method.low_rank and not any(True for _ in layers):
        raise ValueError(
            f"method {method.name!r} adapts feed-forward layers, and those of "
            f"{backbone.model_class} are not linear; legal: a method that adapts attention too"
        )
    if isinstance(method, LowBand):
        _check_sizes(model, backbone, method)
    if method.conditions and not backbone.conditioning:
        raise ValueError(
            f"method {method.name!r} marks the conditioning vector, and none is known of "
            f"{backbone.model_class}; legal: a method that marks tokens (flexidit, ddit)"
        )


def _check_sizes(model: nn.Module, backbone: Backbone, method: LowBand) -> None:
    why = backbone.sizes.why_one(model)
    if why and not method.force:
        raise ValueError(
            f"method {method.name!r} runs noisy steps on a smaller latent, and of "
            f"{backbone.model_class} {why}; legal: LowBand(force=True), for a base that knows it"
        )
    uneven = [mode.name for mode in method.modes if len(set(mode.low_band)) > 1]
    if backbone.sizes.square and uneven:
        raise ValueError(
            f"mode {uneven[0]!r} is not square, and {backbone.model_class} makes squares alone; "
            "legal: one ratio for height and width"
        )


def install(model: nn.Module, engine: Engine) -> None:
    """Attach an engine and what it has prepared to its model; the inverse of `uninstall`."""
    surgery = engine.surgery
    surgery.install(model)
    model.__class__ = elastic_class(surgery.stock, engine.wiring.backbone.rewired, engine.method)
    model.__dict__[ENGINE], model.__dict__[WIRING] = engine, engine.wiring
    # Behind the change of class: hooks that hold the stock forward are given the elastic one.
    rebind_hooks(model, surgery.stock)


def uninstall(model: nn.Module) -> None:
    """Make it the stock model again, exactly.

    Raises:
        RuntimeError: the adapter's own version of base weights is offloaded.
    """
    surgery = model.__dict__[ENGINE].surgery
    surgery.uninstall(model)
    was, model.__class__ = type(model), surgery.stock
    del model.__dict__[ENGINE], model.__dict__[WIRING]
    rebind_hooks(model, was)


@functools.cache
def elastic_class(
    stock: type, rewired: tuple[tuple[str, Rewired], ...] = (), method: Method | None = None
) -> type:
    """A subclass of a diffusers class whose calls go through the engine, if it has one.

    Args:
        rewired: methods of the stock class, and what the backbone puts in their place.
        method: makes the models of ``from_config`` elastic; without it they are as stock ones.
    """
    parts: dict[str, Any] = {
        "forward": _forward_of(stock),
        "save_pretrained": _save_pretrained_of(stock),
        "__reduce_ex__": pickled_as(elastic_class, stock, rewired, method),
        MADE_OF: (stock, rewired, method),
        **{name: _rewired(getattr(stock, name), coarse) for name, coarse in rewired},
        **{x: _followed(getattr(stock, x)) for x in CHANGING if hasattr(stock, x)},
        "__module__": stock.__module__,
        # cache-dit then leaves out the copies of some classes' forward that it would put over ours.
        "_is_patched": True,
    }
    if hasattr(stock, "from_single_file"):  # a file of the base's weights, loaded by from_config
        parts["from_single_file"] = staticmethod(stock.from_single_file)
    return _alike(type(stock))(stock.__name__, (ElasticModel, stock), parts)


class ElasticModel(nn.Module):
    """What an elastic model does otherwise than a stock one; mixed in front of the stock class.

    An object of such a class that has no engine was built from the class, not by `make_elastic`,
    and does as a stock one.
    """

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the stock forward, once per mode; choosing the mode stays outside the graph."""
        engine = engine_of(self)
        if engine is None:
            super().compile(*args, **kwargs)
        else:
            engine.passes.compiled.compile(*args, **kwargs)

    @contextlib.contextmanager
    def cache_context(self, name: str, **facts: Any) -> Iterator[None]:
        """Stock context, where the class has one; its name also tells the branch."""
        stock: Any = super()
        cached = getattr(stock, "cache_context", lambda *_, **__: contextlib.nullcontext())
        engine = engine_of(self)
        if engine is None:
            with cached(name, **facts):
                yield
            return
        place = engine.position.place(engine.position.caller(self))
        previous, place.context = place.context, (name, facts)
        try:
            with cached(name, **facts):
                yield
        finally:
            place.context = previous

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """The model of a folder, elastic if ``save_pretrained`` has left an adapter inside."""
        stock, folder = getattr(cls, MADE_OF)[0], pretrained_model_name_or_path
        adapter = Path(folder) / (kwargs.get("subfolder") or "") / FOLDER
        # New tensors take part in the placement, so they must be there before it.
        later = adapter.is_dir() and offloads(kwargs)
        options = without_places(kwargs) if later else kwargs
        loaded = stock.from_pretrained(folder, *args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if adapter.is_dir():
            make_elastic(model, [Adapter.from_pretrained(adapter)])
        if later:
            dispatch(model, NEW, kwargs)
        return loaded

    @classmethod
    def from_config(cls, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """A new model, as elastic as the one whose class this is, with the method's schedule.

        ``EMAModel.save_pretrained`` puts the average into such a model.
        """
        stock, _, method = getattr(cls, MADE_OF)
        built = stock.from_config(config, *args, **kwargs)
        if method is not None:
            make_elastic(built[0] if isinstance(built, tuple) else built, [method])
        return built


def _forward_of(stock: type) -> Callable[..., Any]:
    """The forward of an elastic class; it has the signature of the stock one."""
    bound = _binder(inspect.signature(stock.forward))

    @unseen
    @functools.wraps(stock.forward)  # caches and modular pipelines read the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        engine: Engine | None = self.__dict__.get(ENGINE)
        if engine is None:
            return stock.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return engine.passes.run_inside(self, bound(self, *args, **kwargs))
        return engine.passes.compiled.outside(engine.run, self, bound(self, *args, **kwargs))

    return forward


def _save_pretrained_of(stock: type) -> Callable[..., None]:
    """What saves an elastic model: the stock files, and the adapter in a folder beside them."""

    @functools.wraps(stock.save_pretrained)  # pipelines read what it accepts
    def save_pretrained(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        engine = engine_of(self)
        if engine is None:
            stock.save_pretrained(self, save_directory, *args, **kwargs)
            return
        # The adapter goes first: with the stock model's files the folder may go to the hub at once.
        if kwargs.get("is_main_process", True):
            engine.adapter(self).save_pretrained(Path(save_directory) / FOLDER)
        uninstall(self)
        try:
            self.save_pretrained(save_directory, *args, **kwargs)
        finally:
            install(self, engine)

    return save_pretrained


@functools.cache
def _alike(kind: type) -> type:
    """The metaclass of elastic classes for a stock metaclass, whose classes can be pickled."""
    alike = type(f"Elastic{kind.__name__}", (_Alike, kind), {})
    copyreg.pickle(alike, _reduced)  # pyrefly: ignore[bad-argument-type]
    return alike


def _reduced(cls: type) -> tuple[Any, ...]:
    return elastic_class, getattr(cls, MADE_OF)


class _Alike(type):
    """Makes a class equal to the one it comes from.

    `diffusers.DiffusionPipeline.from_pipe` takes over a model only if its class is among those that
    the other pipeline names.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or getattr(cls, MADE_OF)[0] is other

    def __hash__(cls) -> int:
        return hash(getattr(cls, MADE_OF)[0])


def _binder(signature: inspect.Signature) -> Callable[..., dict[str, Any]]:
    """Names the arguments of a method's calls, but for ``self``.

    `inspect.Signature.bind` does so too, and takes a hundredth of a small model's coarsest step: it
    is left to say what is wrong with a call.
    """
    _, *parameters = signature.parameters.values()
    names = [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]
    known, plain = set(names), len(names) == len(parameters)
    needed = {x.name for x in parameters if x.default is x.empty}

    def bound(self: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        each_once = len(call) == len(args) + len(kwargs)
        if plain and each_once and needed <= call.keys() <= known:
            return call
        call = dict(signature.bind(self, *args, **kwargs).arguments)
        call.pop("self")
        return call

    return bound


def _rewired(stock: Callable[..., Any], coarse: Rewired) -> Callable[..., Any]:
    """A seam as those in `ditdial.layers.tokens`, for what the stock forward does in a method."""

    @functools.wraps(stock)
    def method(self: nn.Module, *args: Any) -> Any:
        engine: Engine | None = self.__dict__.get(ENGINE)
        own = functools.partial(stock, self)
        if engine is None or not engine.wiring.state.makes_tokens:
            return own(*args)
        return coarse(self, engine.wiring.state, own, *args)

    return method


def _followed(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A method that changes LoRAs, followed by both versions of weights that an adapter has."""

    @functools.wraps(stock)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        engine = engine_of(self)
        if engine is None:
            return stock(self, *args, **kwargs)
        tensors = engine.surgery.tensors
        # Before it, too: pipelines and disabled LoRAs unfuse without a method of the model.
        tensors.keep_up(self)
        done = stock(self, *args, **kwargs)
        tensors.keep_up(self)
        return done

    return method
