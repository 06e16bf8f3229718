"""Published cost tables of text-to-image and video models (FlexiDiT's, DDiT's token counts)."""

from __future__ import annotations

import pytest

from ditdial import FULL, Mode, Plan, Schedule
from ditdial.cost.blocks import Block, Term
from ditdial.cost.shape import PatchCost, TransformerShape
from ditdial.published.models import published_shape

STEPS = 1000


def percent(weak: float, macs) -> float:
    levels = [(STEPS - 1 - i) / STEPS for i in range(STEPS)]
    return 100 * Plan.bind(Schedule.weak_first(weak), levels, macs, guidance=True).ratio


@pytest.mark.parametrize(
    ("weak", "published"),
    [(0.1, 92.9), (0.2, 85.8), (0.3, 78.8), (0.4, 71.7), (0.5, 64.6), (0.6, 57.5)],
)
def test_pixart_256(weak, published):
    macs = published_shape("pixart-alpha-256").block_macs
    assert percent(weak, macs) == pytest.approx(published, abs=0.15)


@pytest.mark.parametrize(
    ("weak", "published"), [(0.2, 84.3), (0.4, 68.6), (0.6, 52.9), (0.8, 37.2)]
)
def test_emu_like_1024(weak, published):
    """1.7 B parameters: width 2048, 24 blocks, cross-attention to about 256 text tokens."""
    d, depth = 2048, 24
    linear = Term(14 * d * d, "stream"), Term(2 * d * d, "text")
    terms = *linear, Term(2 * d, "self"), Term(2 * d, "cross")
    shape = TransformerShape(
        grid=(1, 64, 64),
        patches=PatchCost(width=d, into=64, out=64),
        blocks=(Block(terms=terms),) * depth,
        text_tokens=256,
    )
    assert percent(weak, shape.block_macs) == pytest.approx(published, abs=0.15)


def test_video_tokens_of_the_paper():
    """256 x 384 x 704 frames after an 8x8x8 autoencoder with patch (1, 2, 2): 33,792 tokens."""
    shape = TransformerShape(
        grid=(32, 24, 44), patches=PatchCost(width=1, into=1, out=1), blocks=()
    )
    modes = (FULL, Mode((2, 1, 1)), Mode(2))
    assert [shape.tokens(mode) for mode in modes] == [33792, 16896, 8448]


@pytest.mark.parametrize(
    ("name", "teraflops", "x2", "x4"),
    [
        ("dit-xl-2-256", 0.24, 0.245, 0.063),
        ("pixart-sigma-1024", 6.63, 0.194, 0.050),
        ("sd3-medium-1024", 8.90, 0.237, 0.095),
        ("flux-1-dev-1024", 74.4, 0.289, 0.139),
        ("z-image-1024", 62.5, 0.297, 0.144),
        ("wan-2.1-1.3b-480p", 283, 0.119, 0.024),
        ("wan-2.1-14b-720p", 6523, 0.119, 0.022),
    ],
)
def test_real_sizes(name, teraflops, x2, x4):
    shape = published_shape(name)
    full = shape.macs(FULL)
    assert 2 * full / 1e12 == pytest.approx(teraflops, rel=0.02)
    assert shape.macs(Mode(2)) / full == pytest.approx(x2, abs=1e-3)
    assert shape.macs(Mode(4)) / full == pytest.approx(x4, abs=1e-3)


def test_flux_tokens_with_text():
    shape = published_shape("flux-1-dev-1024")
    tokens = [shape.tokens(mode) for mode in (FULL, Mode(2), Mode(4))]
    assert tokens == [4096, 1024, 256]
    joint = [n + shape.text_tokens for n in tokens]
    assert joint[0] / joint[1] == pytest.approx(3, abs=0.01)
    assert joint[0] / joint[2] == pytest.approx(6, abs=0.01)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model 'dit-xxl'; legal: dit-s-2-256, .*wan"):
        published_shape("dit-xxl")
