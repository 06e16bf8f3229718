"""Let a pretrained Diffusion Transformer change how much work it does at every denoising step.

>>> from ditdial import elastify
>>> handle = elastify(pipe, "path/or/hub-id")
>>> handle.budget = 0.6
>>> images = pipe(...).images
>>> print(handle.report())
>>> handle.remove()
"""

from ditdial.adapter import Adapter
from ditdial.backbones import BACKBONES
from ditdial.elastify import elastify, handle_of
from ditdial.handle import Handle
from ditdial.methods import METHODS, Combined, DDiT, DyDiT, FlexiDiT, PPFlow, SparseDiT
from ditdial.plan.budget import Budget
from ditdial.plan.calibration import Calibration
from ditdial.plan.ddit import Account, DDiTController
from ditdial.plan.execution import Execution
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.plan import Plan
from ditdial.plan.report import Report
from ditdial.plan.schedule import Schedule, Segment
from ditdial.sampling.pixel_pipeline import PixelDiTPipeline

__version__ = "0.1.0.dev0"

__all__ = [
    "BACKBONES",
    "FULL",
    "METHODS",
    "Account",
    "Adapter",
    "Budget",
    "Calibration",
    "Combined",
    "DDiT",
    "DDiTController",
    "DyDiT",
    "Execution",
    "FlexiDiT",
    "Handle",
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
