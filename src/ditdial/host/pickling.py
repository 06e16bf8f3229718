"""How the parts of an elastic model are pickled that have no name to import, or belong to others.

``torch.save(model)``, ``spawn`` and launchers pickle whole models. Generated classes are made again
from what they were made of, and weak references stay behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

MADE_OF = "_ditdial_made_of"
"""Attribute of a generated class: what it is pickled as."""


def pickled_as(make: Callable[..., type], *facts: Any) -> Callable[..., Any]:
    """``__reduce_ex__`` for the objects of a generated class.

    Args:
        make: makes the class of the facts; importable, as they are.
    """

    def __reduce_ex__(self: object, protocol: Any) -> tuple[Any, ...]:
        if type(self) is not make(*facts):  # a class made of that one, with a name of its own
            return object.__reduce_ex__(self, protocol)  # pyrefly: ignore[bad-return]
        _, _, *state = object.__reduce_ex__(self, 2)
        return _blank, (make, *facts), *state

    return __reduce_ex__


def _blank(make: Callable[..., type], *facts: Any) -> object:
    made = make(*facts)
    return object.__new__(made)


class Weak(weakref.ref):
    """A weak reference that a copy shares, and that leads nowhere when it was pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Weak:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _dead, ()


def _dead() -> Weak:
    return Weak(set())
