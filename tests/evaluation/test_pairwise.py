"""PSNR and SSIM: known values, one per image, wrong pairs refused."""

import pytest
import torch

from ditdial.evaluation.pairwise import psnr, ssim


def test_psnr_known_values() -> None:
    a = torch.full((4, 3, 8, 8), 0.5)
    b = a + torch.tensor([0.1, 0.01, 0.5, 0.0])[:, None, None, None]
    expected = torch.tensor([20.0, 40.0, 6.0206, torch.inf])
    torch.testing.assert_close(psnr(a, b), expected, rtol=1e-4, atol=0)


def test_ssim_known_values() -> None:
    flat = torch.zeros(2, 1, 16, 16)
    other = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    # Constant images differ in luminance only: (2 x y + c1) / (x^2 + y^2 + c1), c1 = 0.01^2.
    expected = torch.tensor([1.0, 1e-4 / (1 + 1e-4)])
    torch.testing.assert_close(ssim(flat, other), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_row_in_a_batch_equals_the_row_alone(metric, batch) -> None:
    a, b = torch.rand(2, batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    together = metric(a, b)
    assert together.shape == (batch,)
    torch.testing.assert_close(
        together, torch.cat([metric(x[None], y[None]) for x, y in zip(a, b)])
    )


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_wrong_pairs_are_refused(metric) -> None:
    a = torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match="shape of b"):
        metric(a, a[:1])
    with pytest.raises(ValueError, match="range of b"):
        metric(a, a * 2 + 1)
    with pytest.raises(ValueError, match=r"a = .*uint8"):
        metric(a.byte(), a)


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="at least 6"):
        ssim(torch.rand(1, 1, 5, 8), torch.rand(1, 1, 5, 8))
