"""The class of an elastic model: a generated subclass whose calls go through its engine."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from elastic_dit.engine import Engine

ENGINE = "_elastic_engine"
"""Attribute of an elastic model that holds its engine."""

SIZES = "elastic"
"""Submodule with the new tensors, and the folder of the adapter in a saved model."""


@functools.cache
def elastic_class(stock: type) -> type:
    """A subclass of a diffusers class whose calls go through the engine, if it has one."""
    signature = inspect.signature(stock.forward)
    cached = getattr(stock, "cache_context", lambda *_, **__: contextlib.nullcontext())

    @functools.wraps(stock.forward)  # caches and modular pipelines read the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        engine: Engine | None = self.__dict__.get(ENGINE)
        if engine is None:  # built from the class, not by elastify
            return stock.forward(self, *args, **kwargs)
        call = dict(signature.bind(self, *args, **kwargs).arguments)
        call.pop("self")
        return engine.run(self, call)

    def compile(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Compile the stock forward, once per mode; choosing the mode stays outside the graph."""
        engine: Engine | None = self.__dict__.get(ENGINE)
        if engine is None:
            stock.compile(self, *args, **kwargs)
        else:
            engine.compiled = torch.compile(functools.partial(stock.forward, self), *args, **kwargs)

    @contextlib.contextmanager
    def cache_context(self: nn.Module, name: str, **facts: Any) -> Iterator[None]:
        """Stock context, where the class has one; its name also tells the branch."""
        engine: Engine | None = self.__dict__.get(ENGINE)
        if engine is None:
            with cached(self, name, **facts):
                yield
            return
        previous, engine.context = engine.context, (name, facts)
        try:
            with cached(self, name, **facts):
                yield
        finally:
            engine.context = previous

    def save_pretrained(self: Any, folder: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save the stock model, and the adapter in a folder ``elastic`` inside."""
        engine: Engine | None = self.__dict__.get(ENGINE)
        if engine is None:
            stock.save_pretrained(self, folder, *args, **kwargs)
            return
        adapter = engine.adapter(self)
        engine.uninstall(self)
        try:
            self.save_pretrained(folder, *args, **kwargs)
        finally:
            engine.install(self)
        adapter.save(Path(folder) / SIZES)

    # The stock name goes into saved configs and is what caches and loaders look for.
    parts: dict[str, Any] = {
        "forward": forward,
        "compile": compile,
        "cache_context": cache_context,
        "save_pretrained": save_pretrained,
        "__module__": __name__,
    }
    return type(stock.__name__, (stock,), parts)
