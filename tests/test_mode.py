"""Modes: hashable, named, and refused when they make no sense."""

from __future__ import annotations

import copy
import pickle

import pytest

from elastic_dit import FULL, Mode


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


def test_a_zero_scale_in_a_name_is_refused():
    with pytest.raises(ValueError, match="patch_scale = 0"):
        Mode.parse("patch0")
