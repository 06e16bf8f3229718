"""How a live model's submodules learn the present mode: in-place class swap and one shared router.

A module's class is replaced by a generated subclass (same object, same weights, same keys, as FSDP2
does). What its ``forward`` does stands in `elastic_dit.seams` and its neighbours. No stock
``forward`` is copied.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elastic_dit.mode import FULL, Mode
from elastic_dit.ops.patching import Triple, coarse_grid
from elastic_dit.packing import Layout
from elastic_dit.pickling import MADE_OF, pickled_as

if TYPE_CHECKING:
    from elastic_dit.backbones.base import Backbone
    from elastic_dit.methods.base import Sizes
    from elastic_dit.narrowing import Narrow
    from elastic_dit.steps_ahead import BatchTables
    from elastic_dit.streams import Streams

ENGINE = "_elastic_engine"
"""Attribute of an elastic model that holds its engine."""

ROUTER = "_elastic_router"
TEXT = "_elastic_text"
MERGED = "_elastic_merged"
PARTS = "_elastic_parts"
PLACE = "_elastic_place"
SLICES = "_elastic_slices"
ROLE = "_elastic_role"
MERGE = "_elastic_merge"
SOURCE = "_elastic_source"


@dataclass(frozen=True)
class Place:
    """Where a module stands among the routed ones.

    Attributes:
        block: number of its block.
        role: whether heads or channels are its features, or both, one after the other.
        features: how many.
        name: of a linear layer, in the model.
    """

    block: int
    role: str = "heads"
    features: int = 0
    name: str = ""


@dataclass(frozen=True)
class TextKey:
    """A prompt's tensor in one run. Holding it keeps its memory from being used again.

    Attributes:
        facts: what changes with memory, content or run; read at once, since the tensor may be
            written to later.
    """

    tensor: Tensor
    run: int
    facts: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        facts = self.run, versions(self.tensor), self.tensor.shape, self.tensor.stride()
        object.__setattr__(self, "facts", facts)

    def __reduce__(self) -> tuple[Any, ...]:
        return TextKey, (self.tensor, self.run)  # a copied tensor has memory of its own

    def same(self, other: TextKey) -> bool:
        """Whether both are the same memory with the same content, in the same run."""
        return self.facts == other.facts


@dataclass(eq=False)
class Router:
    """What a model's swapped submodules read: plain state, set outside any compiled region.

    Attributes:
        patch: latent frames, rows and columns of one base token.
        mode: of the present forward pass, when all rows share one.
        layout: of a packed batch, else None.
        joined: inside such attention, packed tokens regrouped by picture, and the parts that they
            were made of.
        grid: base grid ``(frames, height, width)`` of the present call.
        unit: base tokens per axis in which a compiled forward is told the grid.
        run: number of the present run; what was computed in another may be stale.
        stretch: number of the present stretch of calls, between which nobody can have changed the
            model.
        streams: of the present forward pass, in a sparse mode.
        running: the engine has started the present forward pass.
        device: of the latent; weights may be elsewhere until their module's hooks bring them.
        lengths: of the text and of the whole sequence of each row, where a class joins them row by
            row.
        text: what the text layers' outputs depend on, if they are to be kept for a whole run.
        narrow: what the present forward pass leaves out; None for nothing.
        ahead: outputs that depend on the noise level and labels alone, if they are in tables.
        merged: use weights with the low-rank update added in (one more copy per mode) instead of
            unmerged updates.
    """

    backbone: Backbone
    sizes: Sizes
    patch: Triple = (1, 1, 1)
    mode: Mode = FULL
    layout: Layout | None = None
    joined: tuple[Tensor, list[Tensor]] | None = None
    streams: Streams | None = None
    running: bool = False
    run: int = 0
    stretch: int = 0
    text: TextKey | None = None
    lengths: tuple[list[int], list[int]] | None = None
    grid: Triple = (1, 0, 0)
    unit: Triple = (1, 1, 1)
    merged: bool = False
    merging: bool = False
    tables: dict[Any, Tensor] = field(default_factory=dict)
    device: Any = None
    narrow: Narrow | None = None
    ahead: BatchTables | None = None

    def tokens(self, mode: Mode) -> int:
        """Tokens of one picture of the present grid."""
        return math.prod(coarse_grid(self.grid, mode.patch_scale))

    def constant(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that only ``key`` decides, made once for each device."""
        key = key, self.device
        if key not in self.tables:
            if torch.compiler.is_compiling():  # it belongs to the graph
                return make().to(self.device)
            with torch.inference_mode(False):  # it may be trained with later
                self.tables[key] = make().to(self.device)
        return self.tables[key]


_VERSION = Tensor._version.__get__  # pyrefly: ignore[missing-attribute]
"""A getter takes half the time of a loop."""


def versions(*tensors: Tensor) -> tuple[object, ...]:
    """What changes when any of the tensors is replaced, moved, cast or written to."""
    tracked = not any(map(Tensor.is_inference, tensors))
    counts = map(_VERSION, tensors) if tracked else map(_version, tensors)
    return (*map(Tensor.data_ptr, tensors), *counts)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


@contextlib.contextmanager
def remembered_in_checkpoints(model: nn.Module, router: Router) -> Iterator[None]:
    """Let gradient checkpointing recompute each block in the mode it first ran in.

    Recomputation happens in the backward pass, when the router may long be in another mode.
    """
    if not torch.is_grad_enabled():
        yield  # the search below costs 1 % of a small model's forward pass
        return
    name = "_gradient_checkpointing_func"
    owners = [m for m in model.modules() if m.__dict__.get(name) is not None]
    originals = [owner.__dict__[name] for owner in owners]

    def remembering(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            then = (router.mode, router.layout, router.joined, router.grid, router.narrow)
            # The forward pass goes on with what a block makes of its streams.
            present, streams = router.streams, copy.copy(router.streams)
            first = [True]

            def again(*inner: Any, **named: Any) -> Any:
                now = (router.mode, router.layout, router.joined, router.grid, router.narrow)
                outside = router.streams
                _return_to(router, then)
                router.streams = present if first else streams
                first.clear()
                try:
                    return function(*inner, **named)
                finally:
                    _return_to(router, now)
                    router.streams = outside

            return checkpoint(again, *args, **kwargs)

        return run

    for owner, original in zip(owners, originals, strict=True):
        owner.__dict__[name] = remembering(original)
    try:
        yield
    finally:
        for owner, original in zip(owners, originals, strict=True):
            owner.__dict__[name] = original


def _return_to(router: Router, state: tuple[Any, ...]) -> None:
    router.mode, router.layout, router.joined, router.grid, router.narrow = state


@functools.cache
def _generated(base: type, mixin: type) -> type:
    made_of = (*base.__dict__.get(MADE_OF, (base,)), mixin)
    parts = {
        "__module__": __name__,
        "__reduce_ex__": pickled_as(_swapped, *made_of),
        MADE_OF: made_of,
    }
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), parts)


def _swapped(stock: type, *mixins: type) -> type:
    """The class of a module that was swapped, once or more."""
    return functools.reduce(_generated, mixins, stock)


def swap_class(module: nn.Module, mixin: type, router: Router) -> None:
    """Put ``mixin`` in front of the class of ``module``; `restore_class` undoes it."""
    was = type(module)
    module.__class__ = _generated(was, mixin)
    module.__dict__[ROUTER] = router
    rebind_hooks(module, was)


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class` exactly."""
    was = type(module)
    module.__class__ = was.__bases__[1]
    for key in (ROUTER, MERGED, PARTS, TEXT, PLACE, SLICES, SOURCE):
        module.__dict__.pop(key, None)
    rebind_hooks(module, was)


def rebind_hooks(module: nn.Module, was: type) -> None:
    """Let what was installed earlier call the module's present class.

    accelerate and diffusers both keep the bound ``forward`` they replaced, and cache-dit leaves one
    on the object when it goes; without this the swap would be a silent no-op.

    Args:
        was: the class before.
    """
    forward = types.MethodType(type(module).forward, module)
    if _is_forward_of(was, module, module.__dict__.get("forward")):
        module.__dict__["forward"] = forward
    if _is_forward_of(was, module, module.__dict__.get("_old_forward")):  # accelerate
        module.__dict__["_old_forward"] = forward
    registry = module.__dict__.get("_diffusers_hook")
    for reference in registry._fn_refs if registry is not None else ():  # diffusers
        if _is_forward_of(was, module, reference.original_forward):
            reference.original_forward = forward
        if _is_forward_of(was, module, reference.forward):
            reference.forward = forward


def check_forward(model: nn.Module) -> None:
    """Refuse a model on which somebody has put a ``forward`` that would not ask for a mode.

    Hooks of accelerate and diffusers are no such thing: they call what `rebind_hooks` gives them.

    Raises:
        ValueError: naming where the ``forward`` comes from.
    """
    registry = model.__dict__.get("_diffusers_hook")
    references = registry._fn_refs if registry is not None else ()
    forwards = [model.__dict__.get("forward"), model.__dict__.get("_old_forward")]
    for forward in (*forwards, *(reference.original_forward for reference in references)):
        origin = getattr(getattr(forward, "func", forward), "__module__", None) or "elsewhere"
        is_hook = origin.startswith(("accelerate.hooks", "diffusers.hooks."))
        if forward is None or is_hook or _is_forward_of(type(model), model, forward):
            continue
        raise ValueError(
            f"this model has a forward of its own, from {origin}, which knows no modes; legal: "
            "drop it (del model.forward), put it on the diffusers class, or, as with cache-dit, "
            "elastify first and put it on then"
        )


def _is_forward_of(owner: type, module: nn.Module, function: object) -> bool:
    """Whether a function is a class's ``forward``, bound to the module (not another's wrapper)."""
    bound = isinstance(function, types.MethodType) and function.__self__ is module
    return bound and function.__func__ is owner.forward  # pyrefly: ignore[missing-attribute]
