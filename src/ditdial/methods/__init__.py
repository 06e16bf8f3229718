"""Published systems; one file each with the same parts.

A method has a configuration that checks itself, the modes that it adds, the new modules that it
puts on a base and how these start from the base's weights. What is common to all methods is in the
rooms below; a file here holds what its paper adds.
"""

from __future__ import annotations

from typing import Any

from ditdial.methods.base import Method
from ditdial.methods.combined import Combined
from ditdial.methods.ddit import DDiT
from ditdial.methods.dydit import DyDiT
from ditdial.methods.flexidit import FlexiDiT
from ditdial.methods.low_band import LowBand
from ditdial.methods.ppflow import PPFlow
from ditdial.methods.sparsedit import SparseDiT
from ditdial.plain.checks import did_you_mean

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (FlexiDiT, DDiT, PPFlow, DyDiT, SparseDiT, LowBand, Combined)
}
"""Methods by name."""


def method_from_config(name: object, config: dict[str, Any]) -> Method:
    """Build a method from an adapter's config.

    Raises:
        ValueError: unknown method or configuration.
    """
    if name not in METHODS:
        near = did_you_mean(name, METHODS)
        raise ValueError(f"unknown method {name!r}; legal: {', '.join(METHODS)}{near}")
    try:
        return METHODS[str(name)](**config)
    except TypeError as error:
        raise ValueError(f"configuration of method {name!r} is not understood: {error}") from error


__all__ = [
    "METHODS",
    "Combined",
    "DDiT",
    "DyDiT",
    "FlexiDiT",
    "LowBand",
    "Method",
    "PPFlow",
    "SparseDiT",
    "method_from_config",
]
