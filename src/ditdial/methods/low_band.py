"""LowBand: noisy steps on a smaller latent, by a base that knows several sizes as it is.

No parameters and no training. Where noise drowns the fine structure of a latent, its low band is
all that a step can say something about, and that is a latent of the same model at a smaller size
and another time (`ditdial.ops.low_band`). Progressive resolution (SPEED, 2605.18736; Bottleneck
Sampling, 2503.18940; RALU, 2507.08422) has the same aim and changes the run instead: it starts on
small latents, enlarges them on the way and draws new noise. Here the latent, the noise levels, the
solver's history and the seed stay as they are.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ditdial.backbones.base import Backbone
from ditdial.host.parametrization import parametrization, straight_level
from ditdial.layers.new_modules import NewModules
from ditdial.methods.base import Method
from ditdial.ops.patching import Triple
from ditdial.plain.checks import require
from ditdial.plain.kinds import checked_fields
from ditdial.plan.mode import Mode
from ditdial.plan.schedule import Schedule, Segment

Ratio = float | tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class LowBand(Method):
    """Configuration.

    Args:
        ratios: how many times shorter the sides of the smaller latents are, one number for height
            and width or both; each makes a mode (``band2``). The small base grid is rounded up.
        force: also on a base that was trained at one size.

    Raises:
        ValueError: a ratio out of range, none, or one twice.
    """

    ratios: tuple[Ratio, ...] = (2,)
    force: bool = False

    name = "low-band"
    paper = "none (cf. SPEED, arXiv 2605.18736)"
    recipes = ()

    @checked_fields
    def __post_init__(self) -> None:
        some = isinstance(self.ratios, tuple | list)
        require(some, "ratios", self.ratios, "a tuple of numbers or of pairs, as (2,)")
        ratios = tuple(tuple(each) if isinstance(each, list) else each for each in self.ratios)
        object.__setattr__(self, "ratios", ratios)
        try:
            once = len(set(self.modes)) == len(ratios) > 0
        except ValueError as error:
            raise ValueError(f"ratios = {ratios}: {error}") from error
        low = all(mode.is_low_band for mode in self.modes)
        require(once and low, "ratios", ratios, "at least one, all different, each above 1")

    @property
    def modes(self) -> tuple[Mode, ...]:
        return tuple(Mode(low_band=ratio) for ratio in self.ratios)

    @property
    def low_rank(self) -> int:
        return 0

    @property
    def trains_base(self) -> bool:
        return False

    def schedule_for(self, model: nn.Module, backbone: Backbone, pipe: Any) -> Schedule:
        """The default: a rule from the spectrum of latents of the model's usual size.

        The smallest latents come first, each down to the noise level at which more than its band
        begins to matter (`ditdial.plan.spectrum`); full mode below.

        Raises:
            ValueError: a pipeline that does not tell what its model predicts.
        """
        level_of = straight_level if pipe is None else parametrization(pipe).level_of
        spectrum, (_, height, width) = backbone.sizes.spectrum, backbone.default_size(model)[0]
        _, h, w = backbone.patches.size(model)
        side = ((height * h) * (width * w)) ** 0.5
        segments, start = [], 1.0
        for mode in sorted(self.modes, key=lambda mode: -_shrinking(mode)):
            switch = spectrum.switch(side, _shrinking(mode))
            # The rule counts levels as flow matching does: noise over noise and signal.
            stop = round(level_of((1 - switch) / switch), 3) if switch else 0.0
            if stop < start:
                segments.append(Segment(start=start, stop=stop, mode=mode))
                start = stop
        full = [Segment(start=start, stop=0.0)] if start > 0 else []
        return Schedule([*segments, *full])

    def build(self, model: nn.Module, backbone: Backbone) -> NewModules:
        return NoModules()

    def to_config(self) -> dict[str, Any]:
        return asdict(self)


class NoModules(NewModules):
    """The stock modules make and end the tokens of a smaller latent."""

    def makes_tokens(self, mode: Mode) -> bool:
        return False

    def embed(self, vectors: Tensor, mode: Mode) -> Tensor:
        raise AssertionError("no tokens are made here")

    def project(self, hidden: Tensor, mode: Mode, grid: Triple) -> Tensor:
        raise AssertionError("no tokens are ended here")


def _shrinking(mode: Mode) -> float:
    """The ratio of a square latent with as many numbers."""
    height, width = mode.low_band
    return (height * width) ** 0.5
