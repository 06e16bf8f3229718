"""The class of an elastic model: a generated subclass whose calls go through its engine."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._dynamo.decorators import skip_code

from ditdial.host.device_map import dispatch, offloads, without_places
from ditdial.host.pickling import MADE_OF, pickled_as
from ditdial.layers.state import ENGINE
from ditdial.runtime.compiled import Graphs

if TYPE_CHECKING:
    from ditdial.backbones.base import Rewired
    from ditdial.methods import Method
    from ditdial.runtime.engine import Engine

SIZES = "elastic"
"""Submodule with the new tensors."""

FOLDER = "elastic.adapter"
"""Folder of the adapter in a saved model. What reads such folders splits all names at the dot."""


@functools.cache
def elastic_class(
    stock: type, rewired: tuple[tuple[str, Rewired], ...] = (), method: Method | None = None
) -> type:
    """A subclass of a diffusers class whose calls go through the engine, if it has one.

    Args:
        rewired: methods of the stock class, and what the backbone puts in their place.
        method: makes the models of ``from_config`` elastic; without it they are as stock ones.
    """
    bound = _binder(inspect.signature(stock.forward))
    cached = getattr(stock, "cache_context", lambda *_, **__: contextlib.nullcontext())

    @functools.wraps(stock.forward)  # caches and modular pipelines read the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        engine: Engine | None = self.__dict__.get(ENGINE)
        if engine is None:  # built from the class, not by elastify
            return stock.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return engine.run_inside(self, bound(self, *args, **kwargs))
        # This is None unless `torch.compile(model)` is at work. It must not see what chooses the
        # mode, only the stock forward, where the engine gives it back.
        engine.compiler = set_eval_frame(None)
        try:
            return engine.run(self, bound(self, *args, **kwargs))
        finally:
            compiler, engine.compiler = engine.compiler, None
            set_eval_frame(compiler)

    skip_code(forward.__code__)

    def compile(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Compile the stock forward, once per mode; choosing the mode stays outside the graph."""
        engine: Engine | None = self.__dict__.get(ENGINE)
        if engine is None:
            stock.compile(self, *args, **kwargs)
        else:
            engine.compiled = Graphs(
                stock.forward,
                engine.router,
                lambda function: torch.compile(function, *args, **kwargs),
            )

    @contextlib.contextmanager
    def cache_context(self: nn.Module, name: str, **facts: Any) -> Iterator[None]:
        """Stock context, where the class has one; its name also tells the branch."""
        engine: Engine | None = self.__dict__.get(ENGINE)
        if engine is None:
            with cached(self, name, **facts):
                yield
            return
        previous, engine.timeline.context = engine.timeline.context, (name, facts)
        try:
            with cached(self, name, **facts):
                yield
        finally:
            engine.timeline.context = previous

    @functools.wraps(stock.save_pretrained)  # pipelines read what it accepts
    def save_pretrained(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        engine: Engine | None = self.__dict__.get(ENGINE)
        if engine is None:
            stock.save_pretrained(self, save_directory, *args, **kwargs)
            return
        # The adapter goes first: with the stock model's files the folder may go to the hub at once.
        if kwargs.get("is_main_process", True):
            engine.adapter(self).save(Path(save_directory) / FOLDER)
        engine.uninstall(self)
        try:
            self.save_pretrained(save_directory, *args, **kwargs)
        finally:
            engine.install(self)

    @classmethod
    def from_pretrained(
        cls: type, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """The model of a folder, elastic if `save_pretrained` has left an adapter inside."""
        from ditdial.elastify import elastify  # it makes use of this class

        folder = pretrained_model_name_or_path
        adapter = Path(folder) / (kwargs.get("subfolder") or "") / FOLDER
        # New tensors take part in the placement, so they must be there before it.
        later = adapter.is_dir() and offloads(kwargs)
        options = without_places(kwargs) if later else kwargs
        loaded = stock.from_pretrained(folder, *args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if adapter.is_dir():
            elastify(model, adapter)
        if later:
            dispatch(model, SIZES, kwargs)
        return loaded

    @classmethod
    def from_config(cls: type, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """A new model, as elastic as the one whose class this is, with the method's schedule.

        ``EMAModel.save_pretrained`` puts the average into such a model.
        """
        from ditdial.elastify import elastify  # it makes use of this class

        built = stock.from_config(config, *args, **kwargs)
        if method is not None:
            elastify(built[0] if isinstance(built, tuple) else built, method)
        return built

    # The stock names go into saved configs and are what caches and loaders look for.
    parts: dict[str, Any] = {
        "forward": forward,
        "compile": compile,
        "cache_context": cache_context,
        "save_pretrained": save_pretrained,
        "from_pretrained": from_pretrained,
        "from_config": from_config,
        "__reduce_ex__": pickled_as(elastic_class, stock, rewired, method),
        MADE_OF: (stock, rewired, method),
        **{name: _rewired(getattr(stock, name), coarse) for name, coarse in rewired},
        "__module__": stock.__module__,
        # cache-dit then leaves out the copies of some classes' forward that it would put over ours.
        "_is_patched": True,
    }
    if hasattr(stock, "from_single_file"):  # a file of the base's weights, loaded by from_config
        parts["from_single_file"] = staticmethod(stock.from_single_file)
    return _alike(type(stock))(stock.__name__, (stock,), parts)


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
        return cls is other or cls.__bases__[0] is other

    def __hash__(cls) -> int:
        return hash(cls.__bases__[0])


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
        if engine is None or not engine.router.sizes.routes(engine.router.mode):
            return own(*args)
        return coarse(self, engine.router, own, *args)

    return method
