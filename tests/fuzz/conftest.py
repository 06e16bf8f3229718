"""What odd inputs are tried on: a tiny model with an adapter and a calibration of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.fuzz.readers import Reader, readers

from ditdial import Adapter, Calibration, DDiT, DyDiT, FlexiDiT, PPFlow, SparseDiT, elastify
from ditdial.adapter import identity
from ditdial.handle import Handle
from ditdial.methods import Combined

SPARSE = {"pool": 0, "modules": 1, "group": (1, 0, 1, 0), "top": 0, "stages": ((0.0, 3),)}

METHODS = {
    "flexidit": FlexiDiT(scales=(2, 4), rank=2),
    "shared": FlexiDiT(scales=(2,), recipe="shared"),
    "ddit": DDiT(scales=(2,), rank=2),
    "ppflow": PPFlow(),
    "dydit": DyDiT(widths=(0.5, 0.7)),
    "experts": DyDiT(recipe="td-lora", rank=2, scales=(2,)),
    "sparsedit": SparseDiT(**SPARSE),
    "combined": Combined(
        parts=(FlexiDiT(scales=(2,), rank=2), SparseDiT(**SPARSE, recipe="lora"), DyDiT())
    ),
}
"""Every method, with every recipe, for a model of two blocks on a grid of 8 x 8."""


def calibrated(adapter: Adapter) -> Adapter:
    """An adapter of one coarse mode with a calibration of two levels."""
    facts = {
        "format": 1,
        "base": adapter.base,
        "method": identity(adapter.method),
        "guidance_scale": 2.0,
        "choices": [
            {"mode": name, "guide": None, "guidance": "cfg", "gain": 1.0}
            for name in ("full", "patch2")
        ],
        "noise": [0.0, 0.5, 1.0],
        "points": [
            {"level": level, "step_error": [0.0, 0.1], "branch_error": [0.0, 0.1]}
            for level in (0.9, 0.1)
        ],
        "bands": [{"start": 1.0, "stop": 0.0, "rates": [0.0, 0.2]}],
        "seconds": [
            {"device": "cpu", "rows": 2, "alone": {"full": 1.0, "patch2": 0.5}, "together": None}
        ],
        "reference": {"segments": [{"start": 1, "stop": 0, "mode": "full"}]},
    }
    return replace(adapter, calibration=Calibration.from_json(json.dumps(facts)))


@pytest.fixture(scope="session")
def read_by(
    make_model: Callable[..., Any], make_elastic: Callable[..., Handle]
) -> dict[str, Reader]:
    """All readers by name."""
    first, other = make_elastic(scales=(2,)), make_elastic(scales=(2,))
    bare = {name: elastify(make_model(), method).adapter() for name, method in METHODS.items()}
    return readers(make_model(), other, calibrated(first.adapter(take="first")), bare)
