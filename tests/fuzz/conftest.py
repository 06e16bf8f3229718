"""What odd inputs are tried on: a tiny model with an adapter and a calibration of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.fuzz.readers import Reader, readers

from ditdial import Adapter, Calibration
from ditdial.adapter import identity
from ditdial.handle import Handle


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
def read_by(make_model: Callable[..., Any], make_elastic: Callable[..., Handle]) -> dict[str, Reader]:
    """All readers by name."""
    adapter = calibrated(make_elastic(scales=(2,)).adapter(take="first"))
    return readers(make_model(), make_elastic(scales=(2,)), adapter)
