"""What a submodule of an elastic model finds on itself: the state of the pass, and who knows what.

The three stand side by side, so that neither the state nor a backbone has to know the new modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ditdial.backbones.base import Backbone
from ditdial.backbones.forward import WIRING
from ditdial.layers.new_modules import NewModules
from ditdial.layers.state import State


@dataclass(eq=False)
class Wiring:
    """One elastic model's, shared by all its swapped and hooked submodules.

    Attributes:
        state: of the present forward pass.
        backbone: what is known of the model's class.
        new: the modules that a method has added.
    """

    state: State
    backbone: Backbone
    new: NewModules


def wiring_of(module: nn.Module) -> Wiring:
    """The wiring of a submodule that took part in a surgery."""
    return module.__dict__[WIRING]
