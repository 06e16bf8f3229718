"""How close a picture is to another one of the same seed: PSNR and SSIM, one value per image."""

from __future__ import annotations

from torch import Tensor

from ditdial.evaluation.features import check_images
from ditdial.plain.checks import require

# SSIM's Gaussian window reaches 5 pixels past the border, by reflection.
SSIM_REACH = 5


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels, ``(B,)``; infinite where two images are equal.

    Args:
        a, b: images ``(B, C, H, W)`` in [0, 1].

    Raises:
        ValueError: different shapes, not float images, values outside [0, 1].
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check_pair(a, b)
    return peak_signal_noise_ratio(
        a.float(), b.float(), data_range=1.0, reduction="none", dim=(1, 2, 3)
    )


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity, ``(B,)``, at most 1 (Wang et al., 2004; Gaussian window, sigma 1.5).

    Args:
        a, b: images ``(B, C, H, W)`` in [0, 1], at least 6 pixels a side.

    Raises:
        ValueError: different shapes, too small, not float images, values outside [0, 1].
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(a, b)
    side = min(a.shape[-2:])
    require(side > SSIM_REACH, "image side", side, f"at least {SSIM_REACH + 1} pixels")
    # Per-image values come as a batch only if asked for; its default is their mean.
    similarity = structural_similarity_index_measure(
        a.float(), b.float(), data_range=1.0, reduction="none"
    )
    assert isinstance(similarity, Tensor)
    return similarity


def _check_pair(a: Tensor, b: Tensor) -> None:
    check_images(a, "a")
    check_images(b, "b")
    require(a.shape == b.shape, "shape of b", tuple(b.shape), f"{tuple(a.shape)}, as a")
