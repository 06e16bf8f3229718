"""How a pipeline's model was trained to predict, as its scheduler tells it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ditdial.ops.noising import KINDS, Scales


@dataclass(frozen=True)
class Parametrization:
    """What the noise levels of a model mean.

    Args:
        kind: what it predicts; one of `ditdial.ops.noising.KINDS`.
        scales: noise level (the network's time in [0, 1]) -> ``(a, s)``, for latents as the model
            is given them.
        level_of: the noise level of a ratio ``a / s``; that of the least noise that the model knows
            where there is less.
    """

    kind: str
    scales: Callable[[float], tuple[float, float]]
    level_of: Callable[[float], float]

    def at(self, level: float) -> Scales:
        """What latents of a noise level are made of."""
        return Scales(self.kind, *self.scales(level))

    def clean(self, level: float, latent: Tensor, prediction: Tensor) -> Tensor:
        """The clean latent that a prediction implies.

        Args:
            prediction: of the latent's shape; channels of a learned variance are already cut off.
        """
        return self.at(level).clean(latent, prediction)


def straight_level(ratio: float) -> float:
    """The noise level s of ``(1 - s) / s = ratio``."""
    return 1 / (1 + ratio)


def parametrization(pipe: Any) -> Parametrization:
    """Of a pipeline's model: its own ``parametrization`` if it has one, else its scheduler's.

    Raises:
        ValueError: no scheduler, or one whose parametrization is not known.
    """
    own = getattr(pipe, "parametrization", None)
    if own is not None:
        return own
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise ValueError(
            "to know what predictions mean, calls need a pipeline's scheduler; legal for a bare "
            "model: signal='latent', and modes of the latent's own size"
        )
    kind = scheduler.config.get("prediction_type")
    if is_flow_scheduler(scheduler):
        return Parametrization("flow_prediction", lambda level: (1 - level, level), straight_level)
    if kind not in KINDS or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} predicts {kind!r}; legal: a flow-matching "
            f"scheduler, or one with alphas_cumprod that predicts {', '.join(KINDS[1:])}"
        )
    kept = scheduler.alphas_cumprod.double().cpu().numpy()
    count, times = scheduler.config.num_train_timesteps, np.arange(len(kept))

    def scales(level: float) -> tuple[float, float]:
        # Between two times of the table as between any two of its entries.
        share = float(np.interp(level * count, times, kept))
        return math.sqrt(share), math.sqrt(1 - share)

    def level_of(ratio: float) -> float:
        share = ratio**2 / (1 + ratio**2)  # falls with the time
        return float(np.interp(-share, -kept, times)) / count

    return Parametrization(kind, scales, level_of)


def is_flow_scheduler(scheduler: Any) -> bool:
    """Whether a diffusers scheduler works on the rectified-flow path and expects velocities.

    diffusers has no common class of these: their names tell, a subclass's those of its bases, and
    the others have a setting.
    """
    named = any("FlowMatch" in cls.__name__ for cls in type(scheduler).__mro__)
    return named or scheduler.config.get("prediction_type") == "flow_prediction"
