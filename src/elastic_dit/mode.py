"""A mode is one way to run the network for one forward pass."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mode:
    """How much work one forward pass does; hashable, it keys weights, cost tables and graphs.

    Args:
        patch_scale: base patches per axis that one token covers; an int for height and width alike,
            or ``(t, h, w)``. 1 is the base's own patch size.

    Raises:
        ValueError: a scale that is not a whole number of at least 1.
    """

    patch_scale: tuple[int, int, int] = (1, 1, 1)
    name: str = field(init=False, compare=False)
    """``full``, ``patch2``, or ``patch2x1x1``; the inverse of `parse`, and a legal module key."""

    def __init__(self, patch_scale: int | tuple[int, int, int] = 1) -> None:
        scale = (1, patch_scale, patch_scale) if isinstance(patch_scale, int) else patch_scale
        whole = isinstance(scale, tuple | list) and all(type(k) is int and k >= 1 for k in scale)
        if not whole or len(scale) != 3:
            raise ValueError(
                f"patch_scale = {patch_scale!r}; legal: a whole number >= 1, or three (t, h, w)"
            )
        t, h, w = scale
        square = f"patch{h}" if t == 1 and h == w else f"patch{t}x{h}x{w}"
        object.__setattr__(self, "patch_scale", (t, h, w))
        object.__setattr__(self, "name", "full" if t == h == w == 1 else square)

    @property
    def is_full(self) -> bool:
        """Whether this is the base network, exactly as it came."""
        return self.patch_scale == (1, 1, 1)

    def is_coarser_than(self, other: Mode) -> bool:
        """Whether tokens cover at least as much along every axis, and more along one."""
        pairs = list(zip(self.patch_scale, other.patch_scale, strict=True))
        return all(a >= b for a, b in pairs) and self != other

    @classmethod
    def parse(cls, name: str) -> Mode:
        """The mode of a name.

        Raises:
            ValueError: not a mode's name.
        """
        if name == "full":
            return FULL
        if match := re.fullmatch(r"patch(\d+)", name):
            return cls(int(match[1]))
        if match := re.fullmatch(r"patch(\d+)x(\d+)x(\d+)", name):
            return cls((int(match[1]), int(match[2]), int(match[3])))
        raise ValueError(f"unknown mode {name!r}; legal: 'full', 'patchK', 'patchTxHxW'")

    def __str__(self) -> str:
        return self.name


FULL = Mode(1)
"""The base network, exactly as it came."""
