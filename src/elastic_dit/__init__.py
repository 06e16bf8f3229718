"""Let a pretrained Diffusion Transformer change how much work it does at every denoising step.

>>> from elastic_dit import elastify
>>> handle = elastify(pipe, "path/or/hub-id")
>>> handle.budget = 0.6
>>> images = pipe(...).images
>>> print(handle.report())
>>> handle.remove()
"""

from elastic_dit.backbones import BACKBONES
from elastic_dit.budget import Budget
from elastic_dit.calibration import Calibration
from elastic_dit.checkpoint import Adapter, load_adapter
from elastic_dit.ddit_controller import Account, DDiTController
from elastic_dit.elastify import elastify, handle_of
from elastic_dit.handle import Handle
from elastic_dit.methods import METHODS, Combined, DDiT, DyDiT, FlexiDiT, PPFlow, SparseDiT
from elastic_dit.mode import FULL, Mode
from elastic_dit.pipelines import PixelDiTPipeline
from elastic_dit.report import Report
from elastic_dit.schedule import Plan, Schedule, Segment

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
    "load_adapter",
]
