"""Errors about values name the value, what is legal, and what was probably meant."""

from __future__ import annotations

import pytest

from ditdial import Budget, Schedule
from ditdial.methods import method_from_config
from ditdial.plain.checks import did_you_mean, one_of, require
from ditdial.plan.budget import pairings
from ditdial.plan.choice import Choice
from ditdial.plan.mode import Mode


@pytest.mark.parametrize(
    ("value", "legal", "meant"),
    [
        ("patch22", ["full", "patch2", "patch4"], "patch2"),
        ("FLOPS ", ["flops", "seconds"], "flops"),
        ("flexidit", ["FlexiDiT", "DDiT"], "FlexiDiT"),
        ("second", ["flops", "seconds"], "seconds"),
        ("euros", ["flops", "seconds"], None),
        ("", ["flops"], None),
        (3, ["3"], None),
        ("flops", [], None),
    ],
)
def test_the_nearest_name_is_proposed(value, legal, meant):
    assert did_you_mean(value, legal) == ("" if meant is None else f" (did you mean {meant!r}?)")


def test_a_name_is_one_of_the_legal_ones():
    one_of("currency", "flops", ("flops", "seconds"))
    with pytest.raises(ValueError, match=r"^currency = 3; legal: 'flops', 'seconds'$"):
        one_of("currency", 3, ("flops", "seconds"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Budget(0.5, "flop"), r"currency = 'flop'; legal: .*mean 'flops'\?\)"),
        (lambda: Budget(0.5, criterion="pictures"), r"criterion = .*mean 'picture'\?\)"),
        (lambda: Choice(guidance="CFG"), r"guidance = 'CFG'; legal: .*mean 'cfg'\?\)"),
        (lambda: pairings([Mode(2)], "week"), r"guidance = 'week' .*mean 'weak'\?\)"),
        (lambda: method_from_config("flexdit", {}), r"unknown method .*mean 'flexidit'\?\)"),
    ],
)
def test_errors_propose_what_was_meant(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_mode_that_an_adapter_lacks_is_told_its_nearest(make_elastic):
    handle = make_elastic(scales=(2, 4))
    words = r"schedule asks for patch22; .*: full, patch2, patch4 \(did you mean 'patch2'\?\)"
    with pytest.raises(ValueError, match=words):
        handle.schedule = Schedule.constant(Mode.parse("patch22"))


def test_an_illegal_value_is_named_with_the_legal_ones():
    require(True, "budget", 0.5, "(0, 1]")
    with pytest.raises(ValueError, match=r"^budget = 1.2 is out of range; legal: \(0, 1\]$"):
        require(False, "budget", 1.2, "(0, 1]")


def test_the_nearest_legal_name_is_suggested():
    legal = ("flexidit", "ddit", "sparsedit", "FluxTransformer2DModel")
    assert did_you_mean("flexdit", legal) == " (did you mean 'flexidit'?)"
    assert did_you_mean("SPARSEDIT", legal) == " (did you mean 'sparsedit'?)"
    assert did_you_mean("fluxtransformer2d", legal) == " (did you mean 'FluxTransformer2DModel'?)"
    assert did_you_mean("toad", legal) == did_you_mean("", legal) == did_you_mean("x", ()) == ""
    assert did_you_mean(None, legal) == ""
