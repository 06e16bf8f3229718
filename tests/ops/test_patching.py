"""Patching: grouping and its inverse, resizes that keep the gain of a constant picture."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ditdial.ops.patching import (
    RESIZES,
    coarse_grid,
    embed_resize,
    from_base,
    group,
    interpolation_matrix,
    output_resize,
    resize_embedding,
    resize_output,
    to_grouped,
    ungroup,
)

kinds = pytest.mark.parametrize("kind", RESIZES)
layouts = pytest.mark.parametrize("layout", ["Cthw", "thwC"])
scales = pytest.mark.parametrize(
    "scale", [(1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 1, 1), (2, 3, 1), (3, 1, 2), (2, 2, 3)]
)


@pytest.mark.parametrize(
    "grid", [(1, 8, 8), (1, 7, 5), (1, 6, 9), (1, 1, 1), (1, 3, 8), (5, 4, 6), (4, 7, 5), (3, 2, 9)]
)
@pytest.mark.parametrize(
    "scale",
    [(1, k, k) for k in (1, 2, 3, 4)] + [(1, 2, 3), (2, 1, 1), (3, 1, 4), (2, 2, 2), (4, 3, 2)],
)
def test_ungroup_undoes_group_on_ragged_grids_too(grid, scale):
    x = torch.randn(2, *grid, 3)
    grouped = group(x, scale)
    assert grouped.shape == (2, math.prod(coarse_grid(grid, scale)), math.prod(scale) * 3)
    assert torch.equal(ungroup(grouped, grid, scale), x.flatten(1, 3))


@pytest.mark.parametrize(
    ("grid", "scale", "expected"),
    [
        ((1, 8, 8), (1, 2, 2), (1, 4, 4)),
        ((1, 7, 5), (1, 2, 4), (1, 4, 2)),
        ((5, 4, 6), (2, 1, 1), (3, 4, 6)),
        ((5, 4, 6), (4, 3, 7), (2, 2, 1)),
    ],
)
def test_a_ragged_border_is_a_group_of_its_own(grid, scale, expected):
    assert coarse_grid(grid, scale) == expected


def test_a_group_is_row_major_and_a_border_repeats_the_last_row_and_column():
    x = torch.arange(9.0).reshape(1, 1, 3, 3, 1)
    expected = [[0, 1, 3, 4], [2, 2, 5, 5], [6, 7, 6, 7], [8, 8, 8, 8]]
    assert group(x, (1, 2, 2))[0].tolist() == expected


def test_frames_come_first_in_a_group_and_the_last_one_is_repeated():
    x = torch.arange(12.0).reshape(1, 3, 2, 2, 1)  # frame, row, column
    expected = [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 8, 9, 10, 11]]
    assert group(x, (2, 2, 2))[0].tolist() == expected
    pairs = [[0, 4], [1, 5], [2, 6], [3, 7], [8, 8], [9, 9], [10, 10], [11, 11]]
    assert group(x, (2, 1, 1))[0].tolist() == pairs
    rows = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert group(x, (1, 1, 2))[0].tolist() == rows


def test_numbers_of_a_base_vector_stay_together():
    x = torch.arange(8.0).reshape(1, 1, 2, 2, 2)
    assert group(x, (1, 1, 2))[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert group(x, (1, 2, 1))[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


@scales
def test_a_border_is_filled_as_replicate_padding_fills_it(scale):
    x = torch.randn(2, 5, 7, 4, 3)
    sides = [n * k for n, k in zip(coarse_grid((5, 7, 4), scale), scale, strict=True)]
    pad = [n for whole, side in zip(sides[::-1], (4, 7, 5), strict=True) for n in (0, whole - side)]
    padded = F.pad(x.movedim(-1, 1), pad, mode="replicate").movedim(1, -1)
    assert list(padded.shape[1:4]) == sides
    assert torch.equal(group(x, scale), group(padded, scale))


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
    kernel, value = torch.randn(6, 3, 2, 4, 4), torch.randn(3)
    base = torch.einsum("dctpq,c->d", kernel, value)
    for size in ((2, 2, 2), (2, 8, 8), (2, 16, 16), (2, 4, 16), (1, 8, 2), (4, 4, 4), (8, 2, 8)):
        resized = resize_embedding(kernel, size, kind)
        assert resized.shape == (6, 3, *size)
        torch.testing.assert_close(torch.einsum("dctpq,c->d", resized, value), base)


def test_a_naive_resize_would_be_k_squared_too_large():
    kernel = torch.randn(6, 3, 1, 4, 4)
    naive = F.interpolate(kernel[:, :, 0], size=8, mode="bilinear")
    good = resize_embedding(kernel, (1, 8, 8))[:, :, 0]
    torch.testing.assert_close(naive.sum((2, 3)), 4 * good.sum((2, 3)))


@pytest.mark.parametrize("scale", [(1, 2, 2), (1, 4, 4), (1, 1, 2), (2, 1, 1), (2, 4, 2)])
def test_pinv_is_exact_on_upsampled_patches(scale):
    kernel, patch = torch.randn(5, 2, 2, 4, 4), torch.randn(1, 2, 2, 4, 4)
    large = F.interpolate(patch, scale_factor=tuple(map(float, scale)), mode="trilinear")
    expected = (kernel * patch).sum((1, 2, 3, 4))
    found = (resize_embedding(kernel, tuple(large.shape[2:]), "pinv") * large).sum((1, 2, 3, 4))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [(1, 2, 2), (1, 1, 3), (2, 1, 1), (2, 3, 2)])
def test_box_averages_the_coarse_patch_down(scale):
    size = (2 * scale[0], 4 * scale[1], 4 * scale[2])
    kernel, large = torch.randn(5, 2, 2, 4, 4), torch.randn(1, 2, *size)
    expected = (kernel * F.avg_pool3d(large, scale)).sum((1, 2, 3, 4))
    found = (resize_embedding(kernel, size, "box") * large).sum((1, 2, 3, 4))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_box_copies_output_samples_and_pinv_interpolates_them():
    rows = torch.randn(5, 3, 2, 4, 4)
    for kind, mode in (("box", "nearest-exact"), ("pinv", "trilinear")):
        expected = F.interpolate(rows, size=(4, 8, 4), mode=mode)
        torch.testing.assert_close(resize_output(rows, (4, 8, 4), kind), expected)


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
    kernel, rows = torch.randn(6, 3, 2, 4, 4), torch.randn(6, 3, 2, 4, 4)
    base = (2, 4, 4)
    for u in ((2, 8, 8), (2, 16, 16), (4, 4, 8)):
        assert torch.equal(resize_embedding(resize_embedding(kernel, u, "box"), base, kind), kernel)
        assert torch.equal(resize_output(resize_output(rows, u, "box"), base, kind), rows)


PATCH, GRID = (2, 1, 3), (6, 6, 6)  # no two sides of a base patch alike
LATENT = tuple(p * n for p, n in zip(PATCH, GRID, strict=True))
AXES = {"C": 1, "t": 3, "h": 5, "w": 7}


def base_vectors(x, layout):
    """Latents ``(B, C, frames, height, width)`` cut into base patch vectors of a layout."""
    (T, H, W), (t, h, w) = GRID, PATCH
    split = x.reshape(len(x), -1, T, t, H, h, W, w)
    return split.permute(0, 2, 4, 6, *(AXES[axis] for axis in layout)).flatten(4)


@layouts
@scales
def test_grouped_kernel_equals_the_convolution(scale, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 4, *LATENT)
    size = tuple(k * p for k, p in zip(scale, PATCH, strict=True))
    kernel = torch.randn(5, 4, *size)
    expected = F.conv3d(x, kernel, stride=size).flatten(2).transpose(1, 2)
    matrix = to_grouped(kernel, scale, layout)
    assert matrix.shape == (5, math.prod(size) * 4)
    found = group(base_vectors(x, layout), scale) @ matrix.T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@layouts
@scales
def test_grouped_output_equals_the_coarse_unpatchify(scale, layout):
    """A transposed convolution whose stride is its kernel writes each coarse patch in its place."""
    size = tuple(k * p for k, p in zip(scale, PATCH, strict=True))
    rows, hidden = torch.randn(5, 4, *size), torch.randn(2, 5, *coarse_grid(GRID, scale))
    expected = F.conv_transpose3d(hidden, rows, stride=size)
    tokens = hidden.flatten(2).transpose(1, 2)
    found = ungroup(tokens @ to_grouped(rows, scale, layout), GRID, scale)
    torch.testing.assert_close(
        found, base_vectors(expected, layout).flatten(1, 3), atol=1e-5, rtol=1e-5
    )


@layouts
@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 4, 4), PATCH])
def test_from_base_undoes_to_grouped_at_scale_one(patch, layout):
    weight = torch.randn(5, 4, *patch)
    matrix = to_grouped(weight, (1, 1, 1), layout)
    assert torch.equal(from_base(matrix, 4, patch, layout), weight)
    assert torch.equal(to_grouped(from_base(matrix, 4, patch, layout), (1, 1, 1), layout), matrix)


@layouts
def test_a_matrix_over_base_vectors_is_the_kernel_that_from_base_says(layout):
    x, matrix = torch.randn(2, 4, *LATENT), torch.randn(5, 4 * math.prod(PATCH))
    expected = F.conv3d(x, from_base(matrix, 4, PATCH, layout), stride=PATCH)
    found = (base_vectors(x, layout) @ matrix.T).movedim(-1, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_two_layouts_are_what_their_names_say():
    weight = torch.arange(12.0).reshape(1, 2, 1, 2, 3)  # channel, frame, row, column
    assert to_grouped(weight, (1, 1, 1), "Cthw")[0].tolist() == list(range(12))
    interleaved = [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
    assert to_grouped(weight, (1, 1, 1), "thwC")[0].tolist() == interleaved
    columns = [0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11]  # three base patches of two rows each
    assert to_grouped(weight, (1, 1, 3), "thwC")[0].tolist() == columns


def test_illegal_resizes_are_named():
    with pytest.raises(ValueError, match=r"'cubic' is unknown; legal kinds: box, pinv"):
        embed_resize(2, 4, "cubic")
    with pytest.raises(ValueError, match="2 and 3: the larger must be a whole multiple"):
        output_resize(2, 3)
    with pytest.raises(ValueError, match="0 and 4"):
        embed_resize(0, 4)


def test_dtype_follows_the_input():
    weight, size = torch.randn(2, 1, 1, 2, 2), (1, 4, 4)
    assert resize_embedding(weight.bfloat16(), size).dtype == torch.bfloat16
    assert resize_output(weight.double(), size).dtype == torch.float64
