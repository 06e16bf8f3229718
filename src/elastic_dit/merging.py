"""Weights with a mode's low-rank updates added in: one copy per layer and mode.

They are made outside any compiled region, and made anew as soon as anything they were made of has
changed. Whether it has is asked at each call, for all layers at once: layer by layer the question
takes a twentieth of a small model's coarsest forward pass.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elastic_dit.mode import Mode
from elastic_dit.routing import versions
from elastic_dit.storage import is_summable

Place = tuple[dict[str, Any], str]
"""A dictionary of parameters, and a name in it."""


@dataclass(eq=False)
class Merges:
    """The merged weights of one model.

    Args:
        layers: those that have low-rank updates (each a `LowRankSeam` while installed).

    Attributes:
        run: number of the run that ``prints`` belong to.
        prints: of each layer's weight, as it was when that run started.
        current: what the copies of each mode were made of.
        places: where that is held. Parameters that are put there later are found too.
    """

    layers: Sequence[Any]
    warned: bool = False
    run: int | None = None
    prints: tuple[object, ...] = ()
    current: dict[Mode, object] = field(default_factory=dict)
    places: dict[Mode, list[Place]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"run": None, "prints": (), "current": {}, "places": {}}

    def forget(self) -> None:
        """The copies are gone: layers lose them with their class."""
        self.current.clear()

    def ready(self, mode: Mode, run: int, device: torch.device) -> None:
        """Make or renew what a mode needs, where that is allowed; warn once where it is not.

        Args:
            run: number of the run.
            device: of the latent.
        """
        if self.run != run:
            self.run, self.prints = run, fingerprints([x.weight for x in self.layers], device)
        if mode not in self.places:
            self.places[mode] = [x for layer in self.layers for x in layer.coarse_places(mode)]
        sources = [held[name] for held, name in self.places[mode] if name in held]
        whole = len(sources) == len(self.places[mode])  # else a weight has been parametrised
        now = device, self.prints, versions(*sources)
        if whole and self.current.get(mode) == now:
            return
        apart = 0
        for layer, fixed in zip(self.layers, self.prints, strict=True):
            apart += not layer.coarse_merge(mode, fixed, device)
        self.current[mode] = now
        if apart and not self.warned:
            warnings.warn(
                f"merge = True, but {apart} of {len(self.layers)} layers keep their low-rank "
                "update apart: their weights are quantised, in eight bits or offloaded",
                stacklevel=8,
            )
            self.warned = True


def fingerprints(weights: Sequence[Tensor], device: torch.device) -> tuple[object, ...]:
    """A number for each weight that changes with its bits, as far as 32 bits can tell.

    PEFT fuses a LoRA through ``.data``, which leaves no trace in a tensor's version.

    Returns:
        An object unlike any other for a weight that cannot be merged on this device, or whose bits
        do not line up.
    """
    readable = [x.device == device and is_summable(x) and _is_in_words(x) for x in weights]
    words = [
        x.detach().flatten().view(torch.int32).sum(dtype=torch.int32)
        for x in itertools.compress(weights, readable)
    ]
    found = iter(torch.stack(words).tolist() if words else ())  # one look at the device
    return tuple([next(found) if known else object() for known in readable])


def _is_in_words(x: Tensor) -> bool:
    return x.is_contiguous() and not (x.nbytes % 4 or x.data_ptr() % 4)
