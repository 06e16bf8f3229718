"""Methods that make a run cheaper by changing the run, to compare with; no part of the library.

Both start on smaller latents, as `ditdial.methods.low_band.LowBand` does, and go on at full size
with noise that the run's seed did not have at the start.

- `ProgressiveResolution`, as SPEED has it (2605.18736): noise is taken away on small latents down
  to a level; the latent is enlarged by its cosine waves, with new noise above them; the rest of the
  run is made at full size.
- `DraftAndRefine`, as MrFlow has it (2607.01642): a whole run on small latents, its picture
  enlarged, some noise on it, and a step or a few at full size.

Each has a name, a ``setup`` and a ``knob``: the fields that its cost depends on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ditdial.cost.shape import TransformerShape
from ditdial.evaluation.autoencoders import decoded, encoded, knows
from ditdial.evaluation.canvas import Canvas, seeded
from ditdial.evaluation.stages import Piece, path_of, run_piece
from ditdial.ops.low_band import Sides, band_of, from_band, ratio_of
from ditdial.ops.noising import Scales
from ditdial.plain.checks import require, whole
from ditdial.plain.kinds import checked_fields
from ditdial.plan.mode import FULL, MOST_RATIO, Mode
from ditdial.plan.plan import MOST_STEPS


@dataclass(frozen=True, kw_only=True)
class Rival(ABC):
    """A way to run a pipeline in two stages, on smaller latents and on its own.

    Args:
        ratio: how many times shorter the sides of the smaller latents are.

    Attributes:
        name: of the method.
        knob: fields that its cost depends on, beside the ratio: steps of both stages.
    """

    name: ClassVar[str]
    knob: ClassVar[tuple[str, str]]
    ratio: float = 2

    @property
    def setup(self) -> dict[str, Any]:
        """All fields, for the record."""
        return asdict(self)

    @property
    def steps(self) -> tuple[int, int]:
        """Steps on smaller latents, and at full size."""
        coarse, fine = (getattr(self, name) for name in self.knob)
        return coarse, fine

    @abstractmethod
    def draw(self, pipe: Any, **call: Any) -> Any:
        """Run a pipeline; its scheduler and components are left as they are.

        Args:
            pipe: a diffusers pipeline whose call takes ``latents``, ``height`` and ``width``, or a
                `ditdial.PixelDiTPipeline`.
            call: its arguments, among them ``height`` and ``width``, in pixels. The generators (or
                seeds) draw the smaller noise, and then what is new.

        Returns:
            What the pipeline returns.

        Raises:
            ValueError: a pipeline, scheduler or argument that does not fit, by name, before work
                starts.
        """

    def macs(self, shape: TransformerShape) -> float:
        """Multiply-adds of the model in a run of one picture, one guidance branch.

        The autoencoder's are not counted.

        Args:
            shape: of the calls at full size (`Backbone.shape`).
        """
        coarse, fine = self.steps
        return coarse * shape.macs(Mode(low_band=self.ratio)) + fine * shape.macs(FULL)

    def share(self, shape: TransformerShape, steps: int) -> float:
        """Cost over that of the pipeline's own run of so many steps."""
        return self.macs(shape) / (steps * shape.macs(FULL))

    def _check(self) -> None:
        for name in self.knob:
            whole(name, getattr(self, name), 1, MOST_STEPS)
        fine = round(100 * self.ratio) / 100 if 1 <= self.ratio <= MOST_RATIO else None
        require(fine == self.ratio, "ratio", self.ratio, f"1 to {MOST_RATIO:g}, two decimals")


@dataclass(frozen=True, kw_only=True)
class ProgressiveResolution(Rival):
    """Small latents down to a noise level, then large ones.

    Args:
        ratio: how many times shorter the sides of the smaller latents are.
        coarse_steps, fine_steps: on smaller latents, and at full size; the levels of either stage
            lie along the pipeline's schedule of as many steps as both have.
        switch: noise level down to which latents are small; by default the one that the schedule
            has reached after the coarse steps. `ditdial.plan.spectrum.Spectrum.switch` says which
            is early enough.

    Raises:
        ValueError: a field out of range.
    """

    coarse_steps: int
    fine_steps: int
    switch: float | None = None

    name = "progressive-resolution"
    knob = ("coarse_steps", "fine_steps")

    @checked_fields
    def __post_init__(self) -> None:
        self._check()
        if self.switch is not None:
            require(0 < self.switch < 1, "switch", self.switch, "above 0, below 1")

    @torch.no_grad()
    def draw(self, pipe: Any, **call: Any) -> Any:
        """See `Rival.draw`."""
        canvas = Canvas.of(pipe, self.ratio, call)
        call, both = seeded(call), self.coarse_steps + self.fine_steps
        coarse = Piece(whole=both, steps=self.coarse_steps, stop=self.switch)
        asked = {**canvas.smaller, "output_type": "latent", "return_dict": False}
        ran, told = run_piece(pipe, coarse, **{**call, **asked}), path_of(pipe.scheduler)
        pictures = canvas.pictures(ran.latents)
        noise = canvas.noise(pictures, call)
        large, own = widened(pictures, noise, told.at(ran.level))
        level = told.level_of(own.signal / own.noise)
        fine = Piece(whole=both, steps=self.fine_steps, start=level, stop=0.0)
        latents = canvas.packed(large, ran.latents)
        return run_piece(pipe, fine, **{**call, "latents": latents}).output


@dataclass(frozen=True, kw_only=True)
class DraftAndRefine(Rival):
    """A picture at a smaller size, enlarged, and refined at its own.

    Args:
        ratio: how many times shorter the sides of the draft are.
        draft_steps, refine_steps: of the draft's own run, and at full size.
        level: noise level that the enlarged draft is brought to; recommended: 0.12 to 0.20.
        pixels: enlarge pixels, not latents, both by bicubic interpolation (the authors have a
            super-resolution network instead); by default where the pipeline has an autoencoder that
            `ditdial.evaluation.autoencoders` knows.

    Raises:
        ValueError: a field out of range.
    """

    draft_steps: int = 12
    refine_steps: int = 1
    level: float = 0.15
    pixels: bool | None = None

    name = "draft-and-refine"
    knob = ("draft_steps", "refine_steps")

    @checked_fields
    def __post_init__(self) -> None:
        self._check()
        require(0 < self.level < 1, "level", self.level, "above 0, below 1")

    @torch.no_grad()
    def draw(self, pipe: Any, **call: Any) -> Any:
        """See `Rival.draw`."""
        canvas, vae = Canvas.of(pipe, self.ratio, call), getattr(pipe, "vae", None)
        in_pixels = knows(vae) if self.pixels is None else self.pixels
        if in_pixels and not knows(vae):
            raise ValueError(f"pixels = True and {type(vae).__name__}; legal for it: False")
        call = seeded(call)
        draft = Piece(whole=self.draft_steps, steps=self.draft_steps)
        asked = {**canvas.smaller, "output_type": "latent", "return_dict": False}
        small = run_piece(pipe, draft, **{**call, **asked}).latents
        pictures = canvas.pictures(small)
        if in_pixels:
            pixels = decoded(vae, pictures)
            each = pixels.shape[-1] // pictures.shape[-1]
            sides = each * canvas.sides[0], each * canvas.sides[1]
            clean = encoded(vae, bicubic(pixels, sides))
        else:
            clean = bicubic(pictures, canvas.sides)
        scales = path_of(pipe.scheduler).at(self.level)
        noised = scales.signal * clean + scales.noise * canvas.noise(pictures, call)
        refine = Piece(whole=self.draft_steps, steps=self.refine_steps, start=self.level, stop=0.0)
        return run_piece(pipe, refine, **{**call, "latents": canvas.packed(noised, small)}).output


def widened(small: Tensor, noise: Tensor, scales: Scales) -> tuple[Tensor, Scales]:
    """A noisy latent enlarged: its cosine waves, and new noise above them.

    Its signal-to-noise is ``1 / r`` times as high, as constants keep their values: for rectified
    flow at t it is a latent at ``kappa t``, ``kappa = r / (1 + (r - 1) t)``.

    Args:
        small: ``(..., h, w)``.
        noise: ``(..., H, W)``, of unit variance.
        scales: what ``small`` is made of.

    Returns:
        ``(..., H, W)`` in the precision of the noise, and what it is made of.
    """
    most: Sides = (noise.shape[-2], noise.shape[-1])
    few: Sides = (small.shape[-2], small.shape[-1])
    own, gain = scales.with_signal(1 / ratio_of(most, few))
    above = noise - from_band(band_of(noise, few), most)
    return (from_band(small.to(noise), most) + scales.noise * above) / gain, own


def bicubic(x: Tensor, sides: Sides) -> Tensor:
    """``(..., h, w) -> (..., H, W)`` by bicubic interpolation, in its dtype."""
    rows = x.reshape(-1, 1, *x.shape[-2:]).float()
    large = functional.interpolate(rows, sides, mode="bicubic", align_corners=False)
    return large.reshape(*x.shape[:-2], *sides).to(x.dtype)
