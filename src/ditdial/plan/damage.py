"""Damage: how far a plan's choices lead away from the run that is meant, summed over its steps.

At signal scale ``alpha`` and noise scale ``s`` let ``u = s / (alpha + s)``, the level of the same
ratio on the straight path of rectified flow: 1 is noise, 0 is data, whatever the schedule. Compare
two stochastic samplers whose predictions of the clean latent have the squared difference ``D``. By
Girsanov's theorem the divergence of the distributions of their paths grows, as ``u`` falls, like

    dKL = (1 - u) / u^3 D du = 1/2 D dSNR,    SNR = (1 - u)^2 / u^2,

which weighs the squared error as the continuous-time loss of variational diffusion models does
(Kingma et al. 2107.00630). It adds up over the steps. So the damage of a plan is a sum, a frontier
over plans is exact (`ditdial.plan.frontier`), and neither the number of steps nor the scheduler of
the measurement matters: only the error at each level does. Damage is told per number of the latent
(errors are means), so it does not grow with the picture.

A step from u to u - w moves the latent by w v with the velocity v = (z - x0) / u, and the error of
that is w^2 D / u^2. The divergence is this error over the noise that hides it, u w / (1 - u), which
vanishes at the data: a last step from 0.001 that moves a pixel by a thousandth would count as much
as one from 0.1. So noise is taken to hide no less than `GRAIN` does, and below that level the rate
is ``(1 - u) / (u GRAIN^2)``.

Shape legend: S steps, P measured points, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

GRAIN = 0.02
"""Noise that hides nothing, as a share of the data's spread: 34 dB, about the grain of pictures.

It is the noise level at which the last of the usual 50 steps begins; runs of at most 50 even steps
are weighed as the theorem has it throughout.
"""


def widths(u_S: Array) -> Array:
    """What each step covers of ``u``, ``(S,)``; the last one ends at 0."""
    return u_S - np.append(u_S[1:], 0.0)


def path_damage(u_S: Array, errors_SK: Array, lowest: float = 0.0) -> Array:
    """Growth of the divergence of two sampling paths in each step, ``(S, K)``.

    Args:
        u_S: where the steps begin, falling.
        errors_SK: squared differences of the predicted clean latents.
        lowest: where the last of them was measured. Below it the error of the velocity is taken to
            stay, so that of the clean latent falls as the square of u.
    """
    if lowest > 0:
        errors_SK = errors_SK * (np.minimum(u_S, lowest) / lowest)[:, None] ** 2
    # At u = 1 there is no signal yet; u = 0 has no step after it.
    noise_S = np.maximum(u_S, GRAIN) ** 2
    rate_S = np.divide(1 - u_S, u_S * noise_S, out=np.zeros_like(u_S), where=u_S > 0)
    return (rate_S * widths(u_S))[:, None] * errors_SK


def between_points(levels_S: Sequence[float], at_P: Sequence[float], known_PK: ArrayLike) -> Array:
    """Errors at noise levels, ``(S, K)``: linear in their logarithm between the measured points.

    A choice without any error, that of the reference itself, has none in between either.

    Args:
        levels_S: where errors are asked for; beyond the points, they are those of the last point.
        at_P: noise levels of the points, rising.
        known_PK: errors at the points.
    """
    known_PK = np.asarray(known_PK, dtype=np.float64)
    logs_PK = np.log(np.maximum(known_PK, np.finfo(float).tiny))
    between_SK = np.exp(np.stack([np.interp(levels_S, at_P, log) for log in logs_PK.T], axis=1))
    return np.where(known_PK.any(axis=0), between_SK, 0.0)
