"""Arguments and fields hold what their annotations say, or are refused by name.

What a class or a function says of its own values comes first, since it knows more: ranges, whole
numbers, what goes together. Where it stumbles over a value instead, or takes one that its
annotation does not, the annotation speaks.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Real
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

Given = ParamSpec("Given")
Made = TypeVar("Made")

STUMBLES = (TypeError, AttributeError, ValueError, IndexError, OverflowError)
"""What Python raises of values that it can make nothing of."""

NO_SEQUENCE = (str, bytes, Mapping, set, type)
"""What can be gone through, and is not meant where a list is asked for."""


def checked(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """A function that refuses arguments of another kind than its annotations, by name.

    For questions that are soon answered: they are asked first. Lists may stand for tuples, as files
    have them.

    Raises:
        ValueError: naming the argument, its value and what is legal.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        given = signature.bind(*args, **kwargs).arguments
        return _told(lambda: function(*args, **kwargs), given, _hints(function))

    return call


def checked_fields(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """The ``__post_init__`` of a dataclass that refuses fields of another kind in the same way."""

    @functools.wraps(check)
    def post_init(self: Any) -> None:
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        for each in fields(self):  # a default of None stands for what the check makes of it
            if each.default is None and given.get(each.name, self) is None:
                del given[each.name]
        _told(lambda: check(self), given, _hints(type(self)))

    return post_init


def _told(make: Callable[[], Made], given: Mapping[str, object], hints: dict[str, Any]) -> Made:
    try:
        made = make()
    except STUMBLES as error:
        if "legal: " not in str(error):
            _check_all(given, hints)
        raise
    _check_all(given, hints)
    return made


def _check_all(given: Mapping[str, object], hints: dict[str, Any]) -> None:
    for name, value in given.items():
        check_kind(name, value, hints.get(name, Any))


def check_kind(name: str, value: object, hint: Any) -> None:
    """Refuse a value that is not of the kind of an annotation.

    Raises:
        ValueError: naming the value and what is legal.
    """
    if not _fits(value, hint):
        raise ValueError(f"{name} = {value!r}; legal: {_words(hint)}")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: object, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint in (int, float):
        # Numbers of arrays and tensors are no numbers by their classes.
        number = isinstance(value, Real) or hasattr(type(value), "__float__")
        return number and (hint is int or not isinstance(value, bool))
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        kinds = inner[:1] * len(value) if inner[-1:] == (...,) else inner
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if origin is Sequence:  # arrays are none by their class
        listed = isinstance(value, Iterable) and not isinstance(value, NO_SEQUENCE)
        read = value if isinstance(value, list | tuple) else ()
        return listed and all(_fits(each, inner[0]) for each in read)
    return isinstance(value, origin or hint)


def _words(hint: Any) -> str:
    """What fits an annotation, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, inner))
    if origin is tuple:
        if inner[-1:] == (...,):
            return f"a tuple, each of it {_words(inner[0])}"
        return f"({', '.join(map(_words, inner))})"
    return _WORDS.get(origin or hint) or f"a {(origin or hint).__name__}"


_WORDS: dict[Any, str] = {
    bool: "True, False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "None",
    Any: "anything",
    dict: "a dict",
    Mapping: "a mapping",
    Sequence: "a list",
    Callable: "a function",
}
