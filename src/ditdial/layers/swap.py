"""Class swaps in place: a module keeps its object, weights and keys, as under FSDP2.

A module's class is replaced by a generated subclass whose ``forward`` looks at the state of the
pass. No stock ``forward`` is copied.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

from ditdial.backbones.forward import WIRING
from ditdial.host.pickling import MADE_OF, pickled_as
from ditdial.layers.wiring import Wiring

OURS = "_ditdial_"
"""How the names of all that we put on a stock module begin."""


@functools.cache
def _generated(base: type, mixin: type) -> type:
    made_of = (*base.__dict__.get(MADE_OF, (base,)), mixin)

    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:
        # PEFT makes the parts of a LoRA of the class of their layer; nothing is swapped in those.
        # A copy is made without arguments.
        constructed = cls is made and (args or kwargs)
        return made_of[0](*args, **kwargs) if constructed else object.__new__(cls)

    parts = {
        "__module__": __name__,
        "__new__": __new__,
        "__reduce_ex__": pickled_as(_swapped, *made_of),
        MADE_OF: made_of,
    }
    made = type(f"{mixin.__name__}{base.__name__}", (mixin, base), parts)
    return made


def _swapped(stock: type, *mixins: type) -> type:
    """The class of a module that was swapped, once or more."""
    return functools.reduce(_generated, mixins, stock)


def swap_class(module: nn.Module, mixin: type, wiring: Wiring) -> None:
    """Put ``mixin`` in front of the class of ``module``; `restore_class` undoes it.

    The module keeps its object, weights, buffers, hooks and keys; its class keeps its place among
    the bases, so that ``isinstance`` goes on to hold. Swaps may be stacked and are undone last to
    first.
    """
    was = type(module)
    module.__class__ = _generated(was, mixin)
    module.__dict__[WIRING] = wiring
    rebind_hooks(module, was)


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class` exactly."""
    was = type(module)
    module.__class__ = was.__bases__[1]
    forget(module)
    rebind_hooks(module, was)


def is_swapped(module: nn.Module) -> bool:
    """Whether a module is of a class that `swap_class` has made."""
    return hasattr(type(module), MADE_OF)


def forget(module: nn.Module) -> None:
    """Take off all that was put on a module beside its class; safe to repeat."""
    for key in [key for key in module.__dict__ if key.startswith(OURS)]:
        del module.__dict__[key]


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
