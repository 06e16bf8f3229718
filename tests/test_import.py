"""Importing the package needs the core dependencies only, and has no side effects on torch."""

from __future__ import annotations

import subprocess
import sys

# torchmetrics is a core dependency, but only those who compare pictures should wait for it.
EXTRAS = ("datasets", "torchmetrics", "matplotlib", "tensorboard", "torch_fidelity", "torchvision")
CODE = f"""
import torch
threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
import ditdial, sys
assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
loaded = [name for name in {EXTRAS!r} if name in sys.modules]
assert not loaded, loaded
assert all(hasattr(ditdial, name) for name in ditdial.__all__)
"""


def test_import_needs_no_extra():
    subprocess.run([sys.executable, "-c", CODE], check=True)


def test_cost_command_needs_no_extra():
    code = CODE + "import ditdial.cli.app, ditdial.reference\nassert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
