"""A mode is one way to run the network for one forward pass."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field, replace

BAND = r"band(\d+(?:p\d+)?)(?:x(\d+(?:p\d+)?))?"
PATCH = r"patch(\d+)(?:x(\d+)x(\d+))?"
GRID = r"grid(\d+)(?:x(\d+))?"
KINDS = ("band", "patch", "grid", "width", "keep")
NAME = re.compile(rf"(?:{BAND})?(?:_?{PATCH})?(?:_?{GRID})?(?:_?width(\d+))?(?:_?keep(\d+))?")

MOST_RATIO = 64.0
"""Of a latent's sides to those of its low band."""


@dataclass(frozen=True)
class Mode:
    """How much work one forward pass does; hashable, it keys weights, cost tables and graphs.

    Args:
        patch_scale: base patches per axis that one token covers; an int for height and width alike,
            or ``(t, h, w)``. 1 is the base's own patch size.
        token_grid: rows and columns of the sparse tokens (SparseDiT), a number for both alike; None
            for blocks that all see the same tokens.
        width: share of the blocks' work that routers were trained to leave in (DyDiT's lambda), in
            whole percents; 1 leaves in everything.
        token_keep: share of the tokens that enter the feed-forwards, in the mean over the blocks
            and in whole percents; None leaves that to the token routers.
        low_band: how many times shorter the sides of the latent are that the model is given
            (LowBand), height and width alike or one by one; 1 for the latent itself.

    Raises:
        ValueError: a scale or grid that is not of whole numbers of at least 1; a share or a ratio
            out of range.
    """

    patch_scale: tuple[int, int, int] = (1, 1, 1)
    width: float = 1.0
    token_keep: float | None = None
    token_grid: tuple[int, int] | None = None
    low_band: tuple[float, float] = (1.0, 1.0)
    name: str = field(init=False, compare=False)
    """``full``, ``patch2``, ``patch2x1x1``, ``grid8``, ``grid8x6``, ``patch2_width50_keep80``,
    ``band2``, ``band1p5``, ``band2_patch2``; the inverse of `parse`, and a legal module key."""
    parts: tuple[str, ...] = field(init=False, compare=False, repr=False)
    """Names of what it is made of: ``band2``, ``patch2``, ``grid8``, ``width50_keep80``; none in
    full mode."""

    def __init__(
        self,
        patch_scale: int | tuple[int, int, int] = 1,
        *,
        width: float = 1.0,
        token_keep: float | None = None,
        token_grid: int | tuple[int, int] | None = None,
        low_band: float | tuple[float, float] = 1,
    ) -> None:
        scale = (1, patch_scale, patch_scale) if isinstance(patch_scale, int) else patch_scale
        whole = isinstance(scale, tuple | list) and all(type(k) is int and k >= 1 for k in scale)
        if not whole or len(scale) != 3:
            raise ValueError(
                f"patch_scale = {patch_scale!r}; legal: a whole number >= 1, or three (t, h, w)"
            )
        grid = (token_grid, token_grid) if isinstance(token_grid, int) else token_grid
        if grid is not None:
            whole = isinstance(grid, tuple | list) and all(type(k) is int and k >= 1 for k in grid)
            if not whole or len(grid) != 2:
                raise ValueError(
                    f"token_grid = {token_grid!r}; legal: None, a whole number >= 1, or two (h, w)"
                )
            grid = (grid[0], grid[1])
        if not _is_share(width):
            raise ValueError(f"width = {width!r}; legal: whole percents in (0, 1]")
        if token_keep is not None and (width == 1 or not _is_share(token_keep)):
            raise ValueError(
                f"token_keep = {token_keep!r} with width = {width}; legal: None, or whole percents "
                "in (0, 1] with a width below 1 (whose token routers it uses)"
            )
        ratios = _ratios(low_band)
        t, h, w = scale
        parts = []
        if ratios != (1, 1):
            each = [f"{ratio:g}".replace(".", "p") for ratio in ratios]
            parts.append(f"band{each[0]}" if each[0] == each[1] else f"band{each[0]}x{each[1]}")
        if (t, h, w) != (1, 1, 1):
            parts.append(f"patch{h}" if t == 1 and h == w else f"patch{t}x{h}x{w}")
        if grid is not None:
            parts.append(f"grid{grid[0]}" if grid[0] == grid[1] else f"grid{grid[0]}x{grid[1]}")
        if width != 1:
            kept = "" if token_keep is None else f"_keep{round(100 * token_keep)}"
            parts.append(f"width{round(100 * width)}{kept}")
        if token_keep is not None:
            token_keep = round(100 * token_keep) / 100
        object.__setattr__(self, "patch_scale", (t, h, w))
        object.__setattr__(self, "width", round(100 * width) / 100)
        object.__setattr__(self, "token_keep", token_keep)
        object.__setattr__(self, "token_grid", grid)
        object.__setattr__(self, "low_band", ratios)
        object.__setattr__(self, "name", "_".join(parts) or "full")
        object.__setattr__(self, "parts", tuple(parts))

    @property
    def is_full(self) -> bool:
        """Whether this is the base network, exactly as it came."""
        return not self.parts

    @property
    def has_base_patch(self) -> bool:
        """Whether its tokens are the base's."""
        return self.patch_scale == (1, 1, 1)

    @property
    def is_routed(self) -> bool:
        """Whether routers choose heads, channels and tokens."""
        return self.width < 1

    @property
    def is_sparse(self) -> bool:
        """Whether some blocks see fewer tokens than others."""
        return self.token_grid is not None

    @property
    def is_low_band(self) -> bool:
        """Whether the model is given a smaller latent."""
        return self.low_band != (1, 1)

    def small(self, sides: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the smaller latent, of a latent's; both in base tokens."""
        height, width = (
            math.ceil(side / each) for side, each in zip(sides, self.low_band, strict=True)
        )
        return height, width

    @property
    def covers(self) -> tuple[int, int, int]:
        """Base patches per axis that one token stands for, at most."""
        t, *sides = self.patch_scale
        height, width = (k * math.ceil(each) for k, each in zip(sides, self.low_band, strict=True))
        return t, height, width

    @property
    def band(self) -> Mode:
        """The mode of its smaller latent, otherwise in full mode."""
        return Mode(low_band=self.low_band)

    @property
    def inside(self) -> Mode:
        """The mode that a latent of its size is run in, once it is made smaller."""
        return replace(self, low_band=1) if self.is_low_band else self

    @property
    def patch(self) -> Mode:
        """The mode of its tokens, at full width."""
        return Mode(self.patch_scale)

    @property
    def grid(self) -> Mode:
        """The mode of its sparse tokens, with the base's patches and at full width."""
        return Mode(token_grid=self.token_grid)

    @property
    def routing(self) -> Mode:
        """The mode of its width and kept tokens, with the base's patches on one grid."""
        return Mode(width=self.width, token_keep=self.token_keep)

    def is_coarser_than(self, other: Mode) -> bool:
        """Whether it does at most as much along every axis, and less along one."""
        pairs: list[tuple[float, float]] = []
        pairs += zip(self.patch_scale, other.patch_scale, strict=True)
        pairs += zip(self.low_band, other.low_band, strict=True)
        own, theirs = (
            (math.inf,) * 2 if x.token_grid is None else x.token_grid for x in (self, other)
        )
        pairs += zip(theirs, own, strict=True)
        kept, others = (1.0 if x.token_keep is None else x.token_keep for x in (self, other))
        narrower = self.width <= other.width and kept <= others
        return all(a >= b for a, b in pairs) and narrower and self != other

    @classmethod
    def parse(cls, name: str) -> Mode:
        """The mode of a name.

        Raises:
            ValueError: not a mode's name.
        """
        text = name if isinstance(name, str) else ""
        mode = cls._read(text)
        if mode is not None and mode.name == name:
            return mode
        meant = cls._meant(text) if mode is None else mode
        near = "" if meant is None else f" (did you mean {meant.name!r}?)"
        raise ValueError(
            f"unknown mode {name!r}; legal: 'full', 'patchK' ('patchTxHxW'), 'gridK' ('gridHxW'), "
            "'widthP', 'keepP' in percent, all but the first joined by '_' in this order; in front "
            f"of them or alone 'bandR' ('bandHxW', 'band1p5' for 1.5){near}"
        )

    @classmethod
    def _read(cls, name: str) -> Mode | None:
        """The mode of a name, which may be written in another way than `name` has it.

        Raises:
            ValueError: numbers that no mode has.
        """
        if name == "full":
            return FULL
        match = NAME.fullmatch(name)
        if not name or not match:
            return None
        tall, wide, scale, rows, columns, height, across, width, keep = match.groups()
        ratios = [float(each.replace("p", ".")) for each in (tall or "1", wide or tall or "1")]
        return cls(
            (int(scale), int(rows), int(columns)) if rows else int(scale or 1),
            token_grid=(int(height), int(across or height)) if height else None,
            width=int(width) / 100 if width else 1.0,
            token_keep=int(keep) / 100 if keep else None,
            low_band=(ratios[0], ratios[1]),
        )

    @classmethod
    def _meant(cls, name: str) -> Mode | None:
        """The mode that a name was probably meant for: words put right, parts in their order."""
        parts = {}
        for word, numbers in re.findall(r"([a-z]+)[^a-z0-9]*((?:\d+(?:p\d+)?x?)*)", name.lower()):
            parts |= dict.fromkeys(difflib.get_close_matches(word, ("full", *KINDS), n=1), numbers)
        kinds = [kind for kind in KINDS if kind in parts]
        joined = "_".join(f"{kind}{parts[kind]}" for kind in kinds) or "full" * ("full" in parts)
        try:
            return cls._read(joined)
        except ValueError:  # numbers that no mode has: there is nothing to propose
            return None

    def __str__(self) -> str:
        return self.name


def coarseness(mode: Mode) -> tuple[float, float, str]:
    """A key that sorts modes from the finest to the coarsest."""
    kept = 1.0 if mode.token_keep is None else mode.token_keep
    sparse = math.inf if mode.token_grid is None else math.prod(mode.token_grid)
    coarse = math.prod(mode.patch_scale) * math.prod(mode.low_band)
    return coarse / mode.width / kept, -sparse, mode.name


def _ratios(low_band: float | tuple[float, float]) -> tuple[float, float]:
    """Of height and width.

    Raises:
        ValueError: no numbers, or out of range.
    """
    both = low_band if isinstance(low_band, tuple | list) else (low_band, low_band)
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in both)
    legal = len(both) == 2 and numbers and all(1 <= x <= MOST_RATIO for x in both)
    if not legal or any(abs(100 * x - round(100 * x)) > 1e-6 for x in both):
        raise ValueError(
            f"low_band = {low_band!r}; legal: a number from 1 to {MOST_RATIO:g} of at most two "
            "decimals, or two (height, width)"
        )
    return round(float(both[0]), 2), round(float(both[1]), 2)


def _is_share(share: object) -> bool:
    if isinstance(share, bool) or not isinstance(share, int | float):
        return False
    return 0.01 <= share <= 1 and abs(100 * share - round(100 * share)) < 1e-6


FULL = Mode(1)
"""The base network, exactly as it came."""
