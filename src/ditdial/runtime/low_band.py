"""Low-band modes on a live model: the call is made for a smaller latent, and its answer put back.

Nothing of the run changes: its latent, noise levels, seed and history stay. See
`ditdial.ops.low_band` for what is computed and why; here it is done for the layouts, arguments and
parametrisations of every class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditdial.backbones.arguments import Call
from ditdial.host.parametrization import Parametrization
from ditdial.layers.wiring import Wiring
from ditdial.ops.low_band import Band, Sides, enlarged, shrunk, with_band
from ditdial.ops.patching import Triple
from ditdial.plan.choice import Choice
from ditdial.plan.mode import Mode


@dataclass(frozen=True, kw_only=True)
class SmallerCall:
    """A call in a low-band mode.

    Args:
        wiring: of the model; its state has the grid of the call.
        told: what the model's predictions mean.
        level: noise level of all rows.
    """

    wiring: Wiring
    model: Any
    call: Call
    mode: Mode
    told: Parametrization
    level: float

    def run(self, forward: Callable[[Call, Mode], Any]) -> Any:
        """What the stock model would answer if it saw the band alone.

        Args:
            forward: runs the stock forward on a call, in a mode of the call's own size.

        Raises:
            ValueError: the latent or an argument has no smaller form.
        """
        backbone, state, mode = self.wiring.backbone, self.wiring.state, self.mode
        backbone.check_grid(state.grid, mode)
        backbone.check_call(self.call, mode)
        if self._small == state.grid:
            return forward(self.call, mode.inside)
        sequence = backbone.arguments.latent(self.call)
        whole, behind = backbone.apart(sequence, state)
        pictures = self._pictures(whole)
        noisy, given = self._by_origin(pictures)
        band = Band(noisy, self.told.at(self.level), self._sides)
        axis = backbone.sizes.channels
        smaller = [band.latent.to(noisy.dtype), shrunk(given, self._sides)]
        latent = _joined(self._packed(torch.cat(smaller, dim=axis), sequence), behind)
        call = self._smaller_call(latent, self.told.level_of(band.own.signal / band.own.noise))
        with self._smaller_grid():
            output = forward({**call, "return_dict": False}, mode.inside)
            found, rest = backbone.apart(backbone.arguments.stack(output[0]), state)
            found = self._pictures(found)
        count = noisy.shape[axis]
        own = found.narrow(axis, 0, count)
        variance = found.narrow(axis, count, found.shape[axis] - count)
        sides = (pictures.shape[-2], pictures.shape[-1])
        moved = backbone.direction * band.prediction(backbone.direction * own)
        answer = torch.cat([moved.to(found.dtype), enlarged(variance, sides)], dim=axis)
        prediction = _joined(self._packed(answer, sequence), rest)
        return backbone.arguments.answer(self.call, prediction)

    @property
    def _small(self) -> Triple:
        """Base grid of the smaller latent."""
        frames, height, width = self.wiring.state.grid
        return frames, *self.mode.small((height, width))

    @property
    def _sides(self) -> Sides:
        """Rows and columns of the smaller latent."""
        (_, height, width), (_, h, w) = self._small, self.wiring.state.patch
        return height * h, width * w

    def _pictures(self, sequence: Tensor) -> Tensor:
        """Latents or predictions of the present grid, with rows and columns as their last axes."""
        backbone, state = self.wiring.backbone, self.wiring.state
        found = backbone.sizes.pictures(sequence, backbone.patches, state.patch, state.grid)
        whole = [side * each for side, each in zip(state.grid[1:], state.patch[1:], strict=True)]
        if list(found.shape[-2:]) != whole:
            height, width = found.shape[-2:]
            raise ValueError(
                f"mode {self.mode.name!r} and a latent of {height} x {width}; legal: whole patches "
                f"of {state.patch[1]} x {state.patch[2]}, or full mode"
            )
        return found

    def _packed(self, pictures: Tensor, like: Tensor) -> Tensor:
        backbone = self.wiring.backbone
        return backbone.sizes.packed(pictures, like, backbone.patches, self.wiring.state.patch)

    def _by_origin(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Channels that carry noise, and those of given pictures, which have none.

        Raises:
            ValueError: channels of something else, a mask that is painted.
        """
        backbone = self.wiring.backbone
        axis = backbone.sizes.channels
        own = min(backbone.patches.channels(self.model))
        given = pictures.shape[axis] - own
        if given % own and (given - backbone.sizes.flat_masks) % own:
            raise ValueError(
                f"the latent has {given} channels beside its own {own}, a mask among them, and "
                f"mode {self.mode.name!r} has no smaller form of one; legal with a mask: full mode"
            )
        return pictures.narrow(axis, 0, own), pictures.narrow(axis, own, given)

    def _smaller_call(self, latent: Tensor, level: float) -> Call:
        """The call that the pipeline would make of a smaller latent.

        Args:
            level: its noise level.
        """
        backbone, state = self.wiring.backbone, self.wiring.state
        arguments, times = backbone.arguments, backbone.times
        sizes = backbone.sizes.arguments(self.model, self.call, state.grid, self._small)
        told = times.told(self.call, level, state.grid, self._small)
        sample = list(latent) if arguments.sample in arguments.lists else latent
        return {**self.call, **sizes, arguments.sample: sample, times.argument: told}

    @contextlib.contextmanager
    def _smaller_grid(self) -> Iterator[None]:
        state = self.wiring.state
        whole, state.grid = state.grid, self._small
        try:
            yield
        finally:
            state.grid = whole


def one_high_band(
    wiring: Wiring, choice: Choice, conditional: Tensor, guide: Tensor, *, fixed: bool = False
) -> tuple[Tensor, Tensor]:
    """Predictions of two branches, both with the high band of the one that has more of it.

    Above its band a low one's is carried noise. Guidance would multiply how far that is from what
    the other branch predicts there.

    Args:
        conditional, guide: of the same latents, in the class's layout.
        fixed: the conditional prediction is used already, so that the guide takes its high band
            whichever has more.
    """
    backbone, state = wiring.backbone, wiring.state
    if not choice.mixes_sizes:
        return conditional, guide
    both = [mode.small(state.grid[1:]) for mode in (choice.mode, choice.guide_mode)]
    height, width = (min(sides) for sides in zip(*both, strict=True))
    sides = height * state.patch[1], width * state.patch[2]
    (c, rest), (g, behind) = (backbone.apart(each, state) for each in (conditional, guide))
    own, other = (
        backbone.sizes.pictures(each, backbone.patches, state.patch, state.grid) for each in (c, g)
    )
    guide_is_finer = all(few <= many for few, many in zip(both[0], both[1], strict=True))
    if guide_is_finer and not fixed:
        own = with_band(other, own, sides)
    else:
        other = with_band(own, other, sides)
    c, g = (
        backbone.sizes.packed(each, conditional, backbone.patches, state.patch)
        for each in (own, other)
    )
    return _joined(c, rest), _joined(g, behind)


def _joined(sequence: Tensor, behind: Tensor | None) -> Tensor:
    return sequence if behind is None else torch.cat([sequence, behind], dim=1)
