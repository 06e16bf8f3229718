"""The one form of an argument's error, and the near match that ends it."""

from __future__ import annotations

import pytest

from ditdial.checks import closest, require


def test_an_illegal_value_is_named_with_the_legal_ones():
    require(True, "budget", 0.5, "(0, 1]")
    with pytest.raises(ValueError, match=r"^budget = 1.2 is out of range; legal: \(0, 1\]$"):
        require(False, "budget", 1.2, "(0, 1]")


def test_the_nearest_legal_name_is_suggested():
    legal = ("flexidit", "ddit", "sparsedit", "FluxTransformer2DModel")
    assert closest("flexdit", legal) == " (did you mean 'flexidit'?)"
    assert closest("SPARSEDIT", legal) == " (did you mean 'sparsedit'?)"
    assert closest("fluxtransformer2d", legal) == " (did you mean 'FluxTransformer2DModel'?)"
    assert closest("toad", legal) == closest("", legal) == closest("x", ()) == ""
    assert closest(None, legal) == ""
