"""Latents and predictions as a controller sees them: conditional rows on the base grid."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ditdial.backbones.arguments import Branches
from ditdial.host.parametrization import Parametrization
from ditdial.layers.wiring import Wiring


def shared_part(latent: Tensor, prediction: Tensor) -> tuple[slice, ...]:
    """What latents and predictions both have.

    A learned variance comes behind the prediction, given channels behind the latent.
    """
    sides = zip(latent.shape, prediction.shape, strict=True)
    return tuple(slice(0, min(n, m)) for n, m in sides)


def on_base_grid(wiring: Wiring, sample: Tensor, branches: Branches | None) -> Tensor:
    """Conditional rows of latents or predictions as ``(B, T, H, W, C, p)``.

    The one form that controllers and calibrations see, whatever the class: B pictures on the base
    grid ``(T, H, W)``, C channels, p numbers of each channel in a base patch.
    """
    backbone, state = wiring.backbone, wiring.state
    x = sample if branches is None else sample[branches.conditional]
    vectors = backbone.vectors(backbone.apart(x.detach(), state)[0], state)
    if len(vectors) != len(x):  # frames folded into the batch
        vectors = vectors.reshape(len(x), -1, *vectors.shape[2:])
    return backbone.patches.by_channel(vectors, state.patch)


def clean_latents(
    wiring: Wiring, told: Parametrization, level: float, latent: Tensor, prediction: Tensor
) -> Any:
    """The clean latents that predictions at a noise level imply; what is given stays as it is.

    Args:
        told: what the model's predictions mean.
        level: noise level of all rows.
        latent, prediction: of all rows. Channels that only one of them has (a learned variance, a
            picture that was given) take no part.
    """
    shared = shared_part(latent, prediction)
    moves = wiring.backbone.direction * prediction[shared]
    clean = latent.clone()
    clean[shared] = told.clean(level, latent[shared], moves).to(clean)
    return clean
