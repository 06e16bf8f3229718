"""Patching: grouping and its inverse, resizes that keep the gain of a constant picture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from elastic_dit.ops.patching import (
    RESIZES,
    coarse_grid,
    embed_resize,
    group,
    interpolation_matrix,
    kernel_to_group,
    output_resize,
    output_to_group,
    resize_embedding,
    resize_output,
    ungroup,
)

kinds = pytest.mark.parametrize("kind", RESIZES)


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (6, 9), (1, 1), (3, 8)])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_ungroup_undoes_group_on_ragged_grids_too(grid, k):
    x = torch.randn(2, *grid, 3)
    grouped = group(x, k)
    h, w = coarse_grid(*grid, k)
    assert grouped.shape == (2, h * w, k * k * 3)
    assert torch.equal(ungroup(grouped, *grid, k), x.flatten(1, 2))


def test_a_group_is_row_major_and_a_border_repeats_the_last_row_and_column():
    x = torch.arange(9.0).reshape(1, 3, 3, 1)
    expected = [[0, 1, 3, 4], [2, 2, 5, 5], [6, 7, 6, 7], [8, 8, 8, 8]]
    assert group(x, 2)[0].tolist() == expected


@pytest.mark.parametrize("kind", ["nearest", "bilinear"])
@pytest.mark.parametrize(("p", "q"), [(1, 4), (2, 4), (2, 8), (4, 4), (4, 8), (3, 9)])
def test_interpolation_rows_sum_to_one(kind, p, q):
    matrix = interpolation_matrix(p, q, kind)
    assert matrix.shape == (q, p)
    torch.testing.assert_close(matrix.sum(1), torch.ones(q, dtype=torch.float64))


def test_interpolation_equals_torch():
    signal = torch.randn(1, 1, 4, dtype=torch.float64)
    for kind, name in (("nearest", "nearest-exact"), ("bilinear", "linear")):
        expected = F.interpolate(signal, size=8, mode=name)
        torch.testing.assert_close(signal @ interpolation_matrix(4, 8, kind).T, expected)


@kinds
@pytest.mark.parametrize(("p", "q"), [(2, 4), (4, 16), (4, 2), (8, 2), (4, 4)])
def test_constant_pictures_keep_their_gain(kind, p, q):
    # An embedding sums over a patch's pixels, an output makes each pixel.
    ones = torch.ones(p, dtype=torch.float64)
    torch.testing.assert_close(embed_resize(p, q, kind).sum(0), ones)
    torch.testing.assert_close(output_resize(p, q, kind).sum(1), torch.ones(q, dtype=ones.dtype))


@kinds
def test_the_same_size_is_the_identity(kind):
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(embed_resize(4, 4, kind), eye)
    torch.testing.assert_close(output_resize(4, 4, kind), eye)


@kinds
def test_embedding_of_a_constant_patch_is_the_bases(kind):
    kernel, value = torch.randn(6, 3, 4, 4), torch.randn(3)
    base = torch.einsum("dcpq,c->d", kernel, value)
    for q in (2, 8, 16):
        resized = resize_embedding(kernel, q, kind)
        torch.testing.assert_close(torch.einsum("dcpq,c->d", resized, value), base)


def test_a_naive_resize_would_be_k_squared_too_large():
    kernel = torch.randn(6, 3, 4, 4)
    naive = F.interpolate(kernel, size=8, mode="bilinear")
    good = resize_embedding(kernel, 8)
    torch.testing.assert_close(naive.sum((2, 3)), 4 * good.sum((2, 3)))


def test_pinv_is_exact_on_upsampled_patches():
    kernel, patch = torch.randn(5, 2, 4, 4), torch.randn(1, 2, 4, 4)
    for k in (2, 4):
        large = F.interpolate(patch, scale_factor=k, mode="bilinear")
        expected = (kernel * patch).sum((1, 2, 3))
        found = (resize_embedding(kernel, 4 * k, "pinv") * large).sum((1, 2, 3))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_box_averages_the_coarse_patch_down():
    kernel, large = torch.randn(5, 2, 4, 4), torch.randn(1, 2, 8, 8)
    expected = (kernel * F.avg_pool2d(large, 2)).sum((1, 2, 3))
    found = (resize_embedding(kernel, 8, "box") * large).sum((1, 2, 3))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_noise_gain_of_table_1_2c():
    # White noise through one coarse token, relative to the base: 0.50 (box), 0.65 (pinv), 1.62.
    base = interpolation_matrix(2, 4, "bilinear")
    eye = torch.eye(2, dtype=torch.float64)
    for matrix, expected in (
        (embed_resize(2, 4, "box"), 0.50),
        (embed_resize(2, 4, "pinv"), 0.65),
        (base, 1.62),
    ):
        gain = (matrix**2).sum() / (eye**2).sum()  # per axis; the square root of its square
        assert gain.item() == pytest.approx(expected, abs=0.02)


@kinds
def test_up_and_down_again_is_exact(kind):
    """The shared recipe starts with ``pinv(Q) w``; ``Q`` down to the base gives back ``w``."""
    kernel, rows = torch.randn(6, 3, 4, 4), torch.randn(4, 4, 3, 6)
    for u in (8, 16):
        assert torch.equal(resize_embedding(resize_embedding(kernel, u, "box"), 4, kind), kernel)
        assert torch.equal(resize_output(resize_output(rows, u, "box"), 4, kind), rows)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_grouped_kernel_equals_the_convolution(k):
    p, x = 2, torch.randn(2, 3, 12, 12)
    kernel = torch.randn(5, 3, k * p, k * p)
    expected = F.conv2d(x, kernel, stride=k * p).flatten(2).transpose(1, 2)
    vectors = x.reshape(2, 3, 6, p, 6, p).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 6, 3 * p * p)
    found = group(vectors, k) @ kernel_to_group(kernel, k).T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_grouped_output_equals_the_coarse_unpatchify(k):
    p, side, channels = 2, 12 // (2 * k), 3
    rows, hidden = torch.randn(k * p, k * p, channels, 5), torch.randn(1, side * side, 5)
    coarse = torch.einsum("yxcd,nd->nyxc", rows, hidden[0]).reshape(side, side, k * p, k * p, -1)
    expected = coarse.permute(4, 0, 2, 1, 3).reshape(channels, 12, 12)
    base = ungroup(hidden @ output_to_group(rows, k).T, 6, 6, k)[0].reshape(6, 6, p, p, channels)
    found = base.permute(4, 0, 2, 1, 3).reshape(channels, 12, 12)
    torch.testing.assert_close(found, expected)


def test_illegal_resizes_are_named():
    with pytest.raises(ValueError, match=r"'cubic' is unknown; legal kinds: box, pinv"):
        embed_resize(2, 4, "cubic")
    with pytest.raises(ValueError, match="2 and 3: the larger must be a whole multiple"):
        output_resize(2, 3)
    with pytest.raises(ValueError, match="0 and 4"):
        embed_resize(0, 4)


def test_dtype_follows_the_input():
    assert resize_embedding(torch.randn(2, 1, 2, 2).bfloat16(), 4).dtype == torch.bfloat16
    assert resize_output(torch.randn(2, 2, 1, 3).double(), 4).dtype == torch.float64
