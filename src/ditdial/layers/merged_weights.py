"""Weights with a mode's low-rank updates added in: one copy per layer and mode.

They are made outside any compiled region, and made anew as soon as anything they were made of has
changed. Whether it has is asked for all layers at once, before each call.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ditdial.host.weights import is_summable, versions
from ditdial.layers.state import State
from ditdial.plain.checks import warn
from ditdial.plan.mode import Mode

Places = tuple[list[dict[str, Any]], list[str]]
"""Dictionaries of parameters, and a name in each."""


@dataclass(eq=False)
class MergedWeights:
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
    places: dict[Mode, Places] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        forgotten = {"run": None, "prints": (), "current": {}, "places": {}}
        return self.__dict__ | forgotten

    def forget(self) -> None:
        """The copies are gone: layers lose them with their class."""
        self.current.clear()

    def ready(self, mode: Mode, state: State) -> None:
        """Make or renew what a mode needs, where that is allowed; warn once where it is not.

        Args:
            state: of the pass; tells the run and the latent's device.
        """
        # Once a run: sums over all weights wait for the device, which versions do not.
        if self.run != state.run:
            weights = [x.weight for x in self.layers]
            self.run, self.prints = state.run, fingerprints(weights, state.device)
        # At every call: a step of the optimizer, or a callback, leaves its trace in a version.
        sources = self._sources(mode)
        made_of = state.device, self.prints, sources
        # A parametrized weight is computed anew at each look, so that no version speaks for it.
        if sources is None or self.current.get(mode) != made_of:
            self._renew(mode, state.device)
            self.current[mode] = made_of

    def _renew(self, mode: Mode, device: torch.device) -> None:
        found = [
            layer.coarse_merge(mode, fixed, device)
            for layer, fixed in zip(self.layers, self.prints, strict=True)
        ]
        reasons = Counter(reason for reason in found if reason is not None)
        if reasons and not self.warned:
            why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            warn(
                f"merge = True, but {reasons.total()} of {len(found)} layers keep their low-rank "
                f"updates unmerged: {why}"
            )
            self.warned = True

    def _sources(self, mode: Mode) -> object:
        """Versions of all that a mode's copies are made of; None if a weight is parametrized."""
        if mode not in self.places:
            places = [x for layer in self.layers for x in layer.coarse_places(mode)]
            self.places[mode] = [held for held, _ in places], [name for _, name in places]
        try:
            return versions(*map(operator.getitem, *self.places[mode]))
        except KeyError:
            return None


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
