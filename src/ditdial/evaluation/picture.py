"""Pictures for people: the same seeds at several costs, and which mode each step ran in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ditdial.plain.figures import share
from ditdial.plan.mode import Mode, coarseness
from ditdial.plan.plan import Plan
from ditdial.plan.report import Report

LABEL_WIDTH = 170
STRIP_HEIGHT = 14
MARGIN = 6
# Colour-blind safe (Okabe and Ito): full mode dark, coarser modes lighter and warmer.
COLOURS = {1: (0, 63, 114), 2: (86, 180, 233), 4: (240, 160, 40), 8: (213, 94, 0)}
NARROW = (0, 158, 115)
NO_BRANCH = (235, 235, 235)

Colour = tuple[int, int, int]
"""Red, green and blue, up to 255."""


@dataclass(frozen=True)
class Row:
    """One line of a comparison: its label, its pictures ``(n, C, H, W)``, and its plan."""

    label: str
    images: Tensor
    plan: Plan | None = None


def mode_colour(mode: Mode | None) -> Colour:
    """Colour of a mode in strips; light grey for a branch that is left out.

    Patches have their own, and the narrower a mode is the greener. Sparse grids are green, the
    fewer their tokens the lighter, half-way to the colour of a coarse patch.
    """
    if mode is None:
        return NO_BRANCH
    colour = COLOURS.get(max(mode.patch_scale), (120, 120, 120))
    if mode.token_grid is not None:
        shade = 70 + 140 // max(mode.token_grid)
        sparse = shade, 150, shade
        colour = sparse if mode.has_base_patch else _between(sparse, colour, 0.5)
    return _between(colour, NARROW, mode.width)


def _between(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(share * a + (1 - share) * b) for a, b in zip(one, other, strict=True))
    return red, green, blue


def comparison(rows: Sequence[Row], *, zoom: int = 2) -> np.ndarray:
    """Rows of pictures with labels; under each row a strip of its plan.

    The strip has one column per step and two lines: the conditional branch above, guidance below.

    Returns:
        ``(height, width, 3)`` uint8.
    """
    count, _, height, width = rows[0].images.shape
    cell_w, cell_h = width * zoom, height * zoom
    line = cell_h + STRIP_HEIGHT + 2 * MARGIN
    canvas = Image.new(
        "RGB", (LABEL_WIDTH + count * cell_w + MARGIN, len(rows) * line + 22 + MARGIN), "white"
    )
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for index, row in enumerate(rows):
        top = MARGIN + index * line
        draw.multiline_text((MARGIN, top + 4), row.label, fill="black", font=font)
        for column, image in enumerate(row.images):
            pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(np.repeat(pixels, 3 // pixels.shape[2], axis=2))
            tile = tile.resize((cell_w, cell_h), Image.Resampling.NEAREST)
            canvas.paste(tile, (LABEL_WIDTH + column * cell_w, top))
        if row.plan is not None:
            _strip(draw, row.plan, LABEL_WIDTH, top + cell_h + 2, count * cell_w)
    steps = [step for row in rows if row.plan for step in row.plan.steps]
    y = len(rows) * line + MARGIN
    x = _legend(draw, (mode for s in steps for mode in (s.mode, s.guide)), LABEL_WIDTH, y)
    draw.text((x, y), "strip: steps, noise to data; guidance below", fill="grey", font=font)
    return np.asarray(canvas)


def _strip(draw: ImageDraw.ImageDraw, plan: Plan, left: int, top: int, width: int) -> None:
    steps = len(plan.steps)
    half = STRIP_HEIGHT // 2
    for step in plan.steps:
        x0, x1 = left + step.index * width // steps, left + (step.index + 1) * width // steps - 2
        draw.rectangle((x0, top, x1, top + half - 2), fill=mode_colour(step.mode))
        draw.rectangle((x0, top + half, x1, top + 2 * half - 2), fill=mode_colour(step.guide))


def decisions(report: Report, *, plan: Plan | None = None, cell: int = 16) -> np.ndarray:
    """One line per picture, one column per step, in the colour of the mode; its cost beside it.

    Args:
        plan: what was planned, as a line above.

    Returns:
        ``(height, width, 3)`` uint8.

    Raises:
        ValueError: a report without calls.
    """
    trails = report.by_picture()
    if not trails:
        raise ValueError("the report holds no calls; legal: one of a run that was made")
    lines: list[tuple[str, list[Mode | None]]] = []
    if plan is not None:
        lines.append((f"plan {share(plan.ratio)}", [step.mode for step in plan.steps]))
    lines += [(f"{i}: {share(trail.ratio)}", trail.modes) for i, trail in enumerate(trails)]
    steps = max(len(modes) for _, modes in lines)
    left = LABEL_WIDTH // 2
    canvas = Image.new(
        "RGB", (left + steps * cell + MARGIN, len(lines) * cell + 22 + 2 * MARGIN), "white"
    )
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for row, (label, modes) in enumerate(lines):
        top = MARGIN + row * cell
        draw.text((MARGIN, top), label, fill="black", font=font)
        for step, mode in enumerate(modes):
            x = left + step * cell
            draw.rectangle((x, top, x + cell - 2, top + cell - 2), fill=mode_colour(mode))
    modes = (mode for _, modes in lines for mode in modes)
    _legend(draw, modes, MARGIN, MARGIN + len(lines) * cell + 4)
    return np.asarray(canvas)


def _legend(draw: ImageDraw.ImageDraw, modes: Iterable[Mode | None], x: int, y: int) -> int:
    """Colours and names of the modes that occur, finest first; returns where the line ends."""
    font = ImageFont.load_default(12)
    for mode in sorted({mode for mode in modes if mode is not None}, key=coarseness):
        draw.rectangle((x, y + 3, x + 10, y + 13), fill=mode_colour(mode))
        draw.text((x + 15, y), mode.name, fill="black", font=font)
        x += max(80, 30 + 7 * len(mode.name))
    return x
