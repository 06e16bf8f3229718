"""Modes: hashable, named, and refused when they make no sense."""

from __future__ import annotations

import copy
import pickle

import pytest

from ditdial import FULL, Mode


def test_equal_modes_are_one_key():
    assert Mode(2) == Mode((1, 2, 2))
    assert {Mode(2): "a"}[Mode((1, 2, 2))] == "a"
    assert FULL == Mode() == Mode(1)
    assert FULL.is_full
    assert not Mode(2).is_full
    assert not Mode((2, 1, 1)).is_full


@pytest.mark.parametrize("scale", [1, 2, 7, (2, 1, 1), (1, 2, 4), (2, 2, 2)])
def test_parse_is_the_inverse_of_name(scale):
    mode = Mode(scale)
    assert Mode.parse(mode.name) == mode
    assert str(mode) == mode.name
    assert "." not in mode.name  # a legal key of a module dictionary
    assert copy.deepcopy(mode) == mode == pickle.loads(pickle.dumps(mode))


def test_names():
    assert Mode(2, width=0.5, token_keep=0.8).name == "patch2_width50_keep80"
    assert Mode(width=0.7).name == "width70"
    names = [Mode(x).name for x in (1, 2, (1, 2, 2), (2, 1, 1), (2, 2, 2), (1, 2, 4))]
    assert names == ["full", "patch2", "patch2", "patch2x1x1", "patch2x2x2", "patch1x2x4"]


def test_a_mode_is_frozen():
    with pytest.raises(AttributeError):
        Mode(2).patch_scale = (1, 3, 3)


@pytest.mark.parametrize("scale", [0, -1, (1, 2), (1, 0, 2), (1, 2.0, 2), "patch2", (), 1.5, None])
def test_illegal_scales_are_named(scale):
    with pytest.raises(ValueError, match=r"patch_scale = .*; legal: a whole number >= 1"):
        Mode(scale)


@pytest.mark.parametrize("name", ["", "Full", "patch", "patch-2", "patch2x2", "weak", "patch2 "])
def test_illegal_names_are_named(name):
    with pytest.raises(ValueError, match=f"unknown mode {name!r}; legal: 'full', 'patchK'"):
        Mode.parse(name)


@pytest.mark.parametrize("name", ["width100", "patch2width50", "keep50", "_width50", "patch1"])
def test_names_that_no_mode_has(name):
    with pytest.raises(ValueError, match=r"unknown mode|token_keep"):
        Mode.parse(name)


@pytest.mark.parametrize("width", [0, 1.2, -0.5, 0.001, 0.505, True, "half"])
def test_illegal_widths_are_named(width):
    with pytest.raises(ValueError, match=r"width = .*; legal: whole percents in \(0, 1\]"):
        Mode(width=width)


@pytest.mark.parametrize(("width", "keep"), [(0.5, 0), (0.5, 1.5), (1, 0.5), (0.5, "all")])
def test_illegal_shares_of_tokens_are_named(width, keep):
    with pytest.raises(ValueError, match=r"token_keep = .*; legal: None, or whole percents"):
        Mode(width=width, token_keep=keep)


@pytest.mark.parametrize("mode", [Mode(width=0.29), Mode(2, width=0.58), Mode(width=0.07)])
def test_percents_survive_their_names(mode):
    assert Mode.parse(mode.name) == mode
    assert hash(Mode.parse(mode.name)) == hash(mode)


def test_what_is_coarser():
    order = [FULL, Mode(width=0.7), Mode(width=0.5), Mode(2, width=0.5)]
    for i, a in enumerate(order):
        for j, b in enumerate(order):
            assert a.is_coarser_than(b) == (i > j)
    assert not Mode(2).is_coarser_than(Mode(width=0.5))
    assert Mode(width=0.5, token_keep=0.5).is_coarser_than(Mode(width=0.5))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Full", "full"),
        ("ful", "full"),
        ("pacth2", "patch2"),
        ("patch-2", "patch2"),
        ("Patch2 ", "patch2"),
        ("patches4", "patch4"),
        ("patch1", "full"),
        ("width100", "full"),
        ("patch2width50", "patch2_width50"),
        ("widht50_kep80", "width50_keep80"),
        ("grid8_patch2", "patch2_grid8"),
        ("grid8x8", "grid8"),
        ("grid 8x6", "grid8x6"),
    ],
)
def test_a_name_that_was_nearly_right_gets_the_right_one(name, meant):
    words = rf"unknown mode {name!r}; legal: 'full', .*\(did you mean '{meant}'\?\)$"
    with pytest.raises(ValueError, match=words):
        Mode.parse(name)
    assert Mode.parse(meant).name == meant


@pytest.mark.parametrize("name", ["", "x", "weak", "patch", "patch2x2", "keep50", "ptch0", 2, None])
def test_nothing_is_proposed_where_nothing_is_near(name):
    with pytest.raises(ValueError, match=f"unknown mode {name!r}; legal|token_keep") as told:
        Mode.parse(name)
    assert "did you mean" not in str(told.value)


def test_a_zero_scale_in_a_name_is_refused():
    with pytest.raises(ValueError, match="patch_scale = 0"):
        Mode.parse("patch0")


def test_names_of_grids():
    modes = [
        Mode(token_grid=8),
        Mode(token_grid=(8, 6)),
        Mode(2, token_grid=4),
        Mode((2, 1, 1), token_grid=(3, 4), width=0.5, token_keep=0.8),
    ]
    names = ["grid8", "grid8x6", "patch2_grid4", "patch2x1x1_grid3x4_width50_keep80"]
    assert [mode.name for mode in modes] == names
    assert [Mode.parse(name) for name in names] == modes
    assert Mode(token_grid=8) == Mode(token_grid=(8, 8)) == Mode(token_grid=[8, 8])
    assert not Mode(token_grid=8).is_full
    assert Mode(token_grid=8).has_base_patch


def test_a_mode_is_made_of_parts():
    mode = Mode(2, token_grid=(4, 3), width=0.5, token_keep=0.8)
    assert mode.parts == ("patch2", "grid4x3", "width50_keep80")
    assert [each.name for each in (mode.patch, mode.grid, mode.routing)] == list(mode.parts)
    assert FULL.parts == ()
    assert FULL.patch == FULL.grid == FULL.routing == FULL
    assert "_".join(mode.parts) == mode.name


@pytest.mark.parametrize("grid", [0, -2, (3,), (3, 0), (1, 2, 3), 2.5, "grid8", True])
def test_illegal_grids_are_named(grid):
    with pytest.raises(ValueError, match=r"token_grid = .*; legal: None, a whole number >= 1"):
        Mode(token_grid=grid)


@pytest.mark.parametrize("name", ["grid", "grid8x8", "grid8_patch2", "patch2grid8", "grid08"])
def test_names_that_no_grid_has(name):
    with pytest.raises(ValueError, match="unknown mode"):
        Mode.parse(name)


def test_fewer_sparse_tokens_are_coarser():
    order = [FULL, Mode(token_grid=8), Mode(token_grid=(8, 6)), Mode(2, token_grid=6)]
    for i, a in enumerate(order):
        for j, b in enumerate(order):
            assert a.is_coarser_than(b) == (i > j)
    assert not Mode(token_grid=(8, 6)).is_coarser_than(Mode(token_grid=(6, 8)))


@pytest.mark.parametrize("ratio", [2, 1.5, 2.25, (2, 1), (1, 3), (1.1, 4)])
def test_names_of_low_bands(ratio):
    mode = Mode(low_band=ratio)
    assert Mode.parse(mode.name) == mode
    assert "." not in mode.name
    assert copy.deepcopy(mode) == mode == pickle.loads(pickle.dumps(mode))
    assert mode.is_low_band
    assert not mode.is_full
    assert mode.parts == (mode.name,)
    assert mode.inside == FULL
    assert mode.band == mode
    both = Mode(2, low_band=ratio)
    assert Mode.parse(both.name) == both
    assert (both.inside, both.band) == (Mode(2), mode)


def test_low_bands_are_written_short_and_a_ratio_of_1_is_none():
    names = [Mode(low_band=x).name for x in (2, 2.0, 1.5, (2, 1), (2.5, 2.5), 1, (1, 1))]
    assert names == ["band2", "band2", "band1p5", "band2x1", "band2p5", "full", "full"]
    assert Mode(low_band=1) == FULL


@pytest.mark.parametrize("ratio", [0.5, 0, -2, 65, 1.234, "2", None, True, (2,), (2, 0.5), 1e9])
def test_illegal_ratios_are_named(ratio):
    with pytest.raises(ValueError, match=r"low_band = .*; legal: a number from 1 to 64"):
        Mode(low_band=ratio)


def test_a_small_grid_is_rounded_up():
    assert Mode(low_band=2).small((7, 8)) == (4, 4)
    assert Mode(low_band=1.5).small((64, 45)) == (43, 30)
    assert Mode(low_band=(2, 1)).small((7, 5)) == (4, 5)
    assert FULL.small((7, 5)) == (7, 5)


def test_smaller_latents_are_coarser():
    assert Mode(low_band=2).is_coarser_than(FULL)
    assert Mode(low_band=4).is_coarser_than(Mode(low_band=2))
    assert not Mode(low_band=2).is_coarser_than(Mode(low_band=2))
    assert not Mode(low_band=(2, 1)).is_coarser_than(Mode(low_band=(1, 2)))
    assert not Mode(low_band=2).is_coarser_than(Mode(2))
    assert Mode(low_band=1.5).covers == (1, 2, 2)
    assert Mode(2, low_band=4).covers == (1, 8, 8)


@pytest.mark.parametrize("name", ["band", "band1", "band2.5", "band0p5", "band2x", "patch2_band2"])
def test_names_that_no_low_band_has(name):
    with pytest.raises(ValueError, match=r"unknown mode|low_band = "):
        Mode.parse(name)
