"""What is put on modules of a live model, and is taken off again.

Some of it belongs to a place in the model rather than to the module that was there first: somebody
may put another one there. PEFT wraps a layer when a LoRA for it is loaded, and puts the layer back
when the last LoRA goes; what makes tokens, or changes what a layer is given, has to do so in front
of the LoRA too.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from ditdial.backbones.forward import WIRING
from ditdial.layers.new_modules import Hook
from ditdial.layers.swap import forget, is_swapped, restore_class, swap_class
from ditdial.layers.wiring import Wiring


class Swap(NamedTuple):
    """A mixin for the front of a module's class.

    Attributes:
        attributes: that the module needs for it.
        follows: it belongs to the place, whichever module is there.
    """

    module: nn.Module
    mixin: type
    attributes: Mapping[str, Any] = {}
    follows: bool = False


@dataclass(eq=False)
class Put:
    """A swap or a hook, and the module that it is on now."""

    what: Swap | Hook
    module: nn.Module
    handle: RemovableHandle | None = None

    def on(self, module: nn.Module, wiring: Wiring) -> None:
        """Put it on a module."""
        self.module, what = module, self.what
        module.__dict__.update(what.attributes)
        if isinstance(what, Swap):
            swap_class(module, what.mixin, wiring)
            return
        # A hook finds its pass on its module, not in a closure, so that a copied model has its own.
        module.__dict__[WIRING] = wiring
        if what.behind:
            self.handle = module.register_forward_hook(what.run)
        else:
            self.handle = module.register_forward_pre_hook(what.run, with_kwargs=True)

    def off(self) -> None:
        """Take it off; of several swaps of one module, the last one goes first."""
        if self.handle is None:
            restore_class(self.module)
            return
        self.handle.remove()
        if not is_swapped(self.module):  # else all is forgotten with its class
            forget(self.module)


@dataclass(eq=False)
class Places:
    """All that is on one model, in the order in which it was put there.

    Attributes:
        followers: what belongs to a place; each place is an entry of ``holders``, by its name.
        present: modules at the places, as they were at the last look.
    """

    puts: list[Put] = field(default_factory=list)
    followers: list[Put] = field(default_factory=list)
    holders: list[dict[str, nn.Module | None]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    present: list[nn.Module | None] = field(default_factory=list)

    def put(self, what: Swap | Hook, wiring: Wiring) -> None:
        """Put one thing more on the model."""
        put = Put(what, what.module)
        put.on(what.module, wiring)
        self.puts.append(put)

    def mark(self, model: nn.Module) -> None:
        """Note the places of what follows them."""
        self.followers = [put for put in self.puts if put.what.follows]
        where = {
            child: (owner._modules, name)
            for owner in model.modules()
            for name, child in owner._modules.items()
        }
        places = [where[put.module] for put in self.followers]
        self.holders, self.names = [holder for holder, _ in places], [name for _, name in places]
        self.present = [put.module for put in self.followers]

    def follow(self, wiring: Wiring) -> bool:
        """Put what follows a place on the module that is there now.

        Every call asks, so that the common answer takes no loop in Python.

        Returns:
            Whether another module is at any of the places.
        """
        present = list(map(dict.get, self.holders, self.names))
        if not any(map(operator.is_not, present, self.present)):
            return False
        for put, module in zip(self.followers, present, strict=True):
            if module is not None and module is not put.module:
                put.off()
                put.on(module, wiring)
        self.present = present
        return True

    def clear(self) -> None:
        """Take all of it off, the last one first."""
        for put in reversed(self.puts):
            put.off()
        for kept in (self.puts, self.followers, self.holders, self.names, self.present):
            kept.clear()
