"""How calls are run: time for memory, with the same results but for rounding."""

from __future__ import annotations

from dataclasses import dataclass

from ditdial.plain.checks import require
from ditdial.plain.kinds import checked_fields


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the calls of an elastic model are run.

    Nothing here changes what a mode computes; all of it is off by default.

    Args:
        merge: keep one more copy of the adapted weights per mode, with the low-rank updates added
            in, so that coarse modes pay nothing for them.
        keep_text: compute layers that only see the prompt (keys and values of cross-attention) once
            per run. Compiled models compute them at every step.
        packed: run guidance branches of different modes in one packed call instead of two; the
            attention of each branch runs by itself.
        width_buckets: how many different sub-networks of a routed mode a run may have; 0 for one
            per step.
        width_slices: how many narrow copies of its weights each routed layer keeps for later calls.
            0 saves memory, at the price of cutting them at every call; as many as buckets cuts them
            once.

    Raises:
        ValueError: a number below 0.
    """

    merge: bool = False
    keep_text: bool = False
    packed: bool = False
    width_buckets: int = 0
    width_slices: int = 1

    @checked_fields
    def __post_init__(self) -> None:
        for name in ("merge", "keep_text", "packed"):
            value = getattr(self, name)
            require(isinstance(value, bool), name, value, "True, False")
        for name in ("width_buckets", "width_slices"):
            value = getattr(self, name)
            require(type(value) is int and value >= 0, name, value, "a whole number >= 0")
