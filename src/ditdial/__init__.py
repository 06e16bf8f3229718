"""Let a pretrained Diffusion Transformer change how much work it does at every denoising step.

>>> from ditdial import elastify
>>> handle = elastify(pipe, "path/or/hub-id")
>>> handle.budget = 0.6
>>> images = pipe(...).images
>>> print(handle.report())
>>> handle.remove()

The names are looked up when they are first used, so that importing the package itself loads
neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditdial.adapter import Adapter
    from ditdial.backbones import BACKBONES, Backbone
    from ditdial.elastify import elastify, handle_of
    from ditdial.handle import Handle
    from ditdial.methods import (
        METHODS,
        Combined,
        DDiT,
        DyDiT,
        FlexiDiT,
        LowBand,
        Method,
        PPFlow,
        SparseDiT,
    )
    from ditdial.plan.budget import Budget
    from ditdial.plan.calibration import Calibration
    from ditdial.plan.controller import Controller
    from ditdial.plan.ddit import Account, DDiTController
    from ditdial.plan.execution import Execution
    from ditdial.plan.mode import FULL, Mode
    from ditdial.plan.plan import Plan
    from ditdial.plan.report import Report
    from ditdial.plan.schedule import Schedule, Segment
    from ditdial.sampling.pixel_pipeline import PixelDiTPipeline

__version__ = "0.1.0.dev0"

MODULES: dict[str, tuple[str, ...]] = {
    "adapter": ("Adapter",),
    "backbones": ("BACKBONES", "Backbone"),
    "elastify": ("elastify", "handle_of"),
    "handle": ("Handle",),
    "methods": (
        "METHODS",
        "Combined",
        "DDiT",
        "DyDiT",
        "FlexiDiT",
        "LowBand",
        "Method",
        "PPFlow",
        "SparseDiT",
    ),
    "plan.budget": ("Budget",),
    "plan.calibration": ("Calibration",),
    "plan.controller": ("Controller",),
    "plan.ddit": ("Account", "DDiTController"),
    "plan.execution": ("Execution",),
    "plan.mode": ("FULL", "Mode"),
    "plan.plan": ("Plan",),
    "plan.report": ("Report",),
    "plan.schedule": ("Schedule", "Segment"),
    "sampling.pixel_pipeline": ("PixelDiTPipeline",),
}
"""Where each public name comes from; the imports above tell type checkers the same."""

__all__ = [
    "BACKBONES",
    "FULL",
    "METHODS",
    "Account",
    "Adapter",
    "Backbone",
    "Budget",
    "Calibration",
    "Combined",
    "Controller",
    "DDiT",
    "DDiTController",
    "DyDiT",
    "Execution",
    "FlexiDiT",
    "Handle",
    "LowBand",
    "Method",
    "Mode",
    "PPFlow",
    "PixelDiTPipeline",
    "Plan",
    "Report",
    "Schedule",
    "Segment",
    "SparseDiT",
    "elastify",
    "handle_of",
]


def __getattr__(name: str) -> object:
    for module, names in MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = value  # found without this function from now on
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package, whose `elastify` is the function even after the module of that name is loaded.

    The import system binds every submodule to its name in the package, whenever it is first
    imported and by whom; for ``ditdial.elastify`` that name is the function's.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name == "elastify" and isinstance(value, ModuleType):
            value = value.elastify
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
