"""Adapters that were saved before the package had its rooms and its name still load, and predict
what they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.backbones.tiny import CASES
from tests.elastic_models import call_of, run
from tests.methods.test_combined import deep

from ditdial import Mode, elastify

HERE = Path(__file__).parent / "adapters_saved_before"
FOLDERS = sorted(path.parent for path in HERE.glob("*/expected.safetensors"))
METHODS = ("flexidit-shared", "flexidit", "ddit", "dydit", "sparsedit", "combined")
DEEP = ("dydit", "sparsedit", "combined")
"""Saved of models with more blocks."""


def test_all_classes_and_these_methods_are_here():
    names = {folder.name.removesuffix(f"-{method}") for folder in FOLDERS for method in METHODS}
    classes = {CASES[name].model_class for name in names if name in CASES}
    assert classes == {case.model_class for case in CASES.values()}
    assert {method for method in METHODS if any(f.name.endswith(method) for f in FOLDERS)} == {
        *METHODS
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_adapter_saved_before_predicts_what_it_did(folder):
    method = next(each for each in METHODS if folder.name.endswith(f"-{each}"))
    name = folder.name.removesuffix(f"-{method}")
    handle = elastify(deep(name) if method in DEEP else CASES[name].model(), folder)
    expected = load_file(folder / "expected.safetensors")
    assert {mode.name for mode in handle.modes[1:]} == set(expected)
    for mode, values in expected.items():
        found = run(handle, call_of(name), Mode.parse(mode))
        found = found[0] if isinstance(found, list) else found
        # The numbers are kept in half precision, of which 2e-3 is four roundings.
        torch.testing.assert_close(
            found.flatten()[: len(values)], values.float(), rtol=2e-3, atol=2e-3, msg=mode
        )
