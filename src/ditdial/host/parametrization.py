"""What a model's prediction says about the clean latent.

With clean signal scale ``a`` and noise scale ``s`` a latent is ``z = a x0 + s e``. Flow matching
has ``a = 1 - s`` and predicts ``e - x0``; variance-preserving models have ``a^2 + s^2 = 1`` and
predict the noise ``e``, the velocity ``a e - s x0``, or the clean latent itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

KINDS = ("flow_prediction", "epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Parametrization:
    """How a model was trained to predict.

    Args:
        kind: one of `KINDS`.
        scales: noise level (the network's time in [0, 1]) -> ``(a, s)``, for latents as the model
            is given them.
    """

    kind: str
    scales: Callable[[float], tuple[float, float]]

    def clean(self, level: float, latent: Tensor, prediction: Tensor) -> Tensor:
        """The clean latent that a prediction implies.

        Args:
            prediction: of the latent's shape; channels of a learned variance are already cut off.
        """
        a, s = self.scales(level)
        if self.kind == "flow_prediction":
            return latent - s * prediction
        if self.kind == "epsilon":
            return (latent - s * prediction) / max(a, 1e-4)  # a is about 0.006 at pure noise
        if self.kind == "v_prediction":
            return a * latent - s * prediction
        return prediction


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
            "predicted clean latents need a pipeline's scheduler; legal for a bare model: the "
            "latents themselves"
        )
    kind = scheduler.config.get("prediction_type")
    if is_flow_scheduler(scheduler):
        return Parametrization("flow_prediction", lambda level: (1 - level, level))
    if kind not in KINDS or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} predicts {kind!r}; legal: a flow-matching "
            f"scheduler, or one with alphas_cumprod that predicts {', '.join(KINDS[1:])}"
        )
    kept, count = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps

    def scales(level: float) -> tuple[float, float]:
        share = float(kept[min(max(round(level * count), 0), len(kept) - 1)])
        return share**0.5, (1 - share) ** 0.5

    return Parametrization(kind, scales)


def is_flow_scheduler(scheduler: Any) -> bool:
    """Whether a diffusers scheduler works on the rectified-flow path and expects velocities.

    diffusers has no common class of these: their names tell, a subclass's those of its bases, and
    the others have a setting.
    """
    named = any("FlowMatch" in cls.__name__ for cls in type(scheduler).__mro__)
    return named or scheduler.config.get("prediction_type") == "flow_prediction"
