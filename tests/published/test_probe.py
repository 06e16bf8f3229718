"""Probing classes, published models and folders."""

from __future__ import annotations

import json

import pytest

from ditdial.published.models import MODELS
from ditdial.published.probe import probe


@pytest.mark.parametrize("name", MODELS)
def test_published_models_are_supported_and_cost_less_when_coarse(name):
    facts = probe(name)
    assert facts["supported"]
    ratios = [row["ratio"] for row in facts["cost"]]
    assert ratios[0] == 1
    assert ratios[1] < 0.35
    assert ratios[2] < ratios[1]
    json.dumps(facts)


def test_a_class_by_name():
    facts = probe("FluxTransformer2DModel")
    assert facts["tokens from"] == "x_embedder"
    assert facts["guidance"] == "one call per branch"
    assert facts["coarse along"] == ["height", "width"]
    assert facts["low-rank layers"] == 19 * 6 + 38 * 5


def test_a_class_without_a_default_config_still_tells_its_seams():
    facts = probe("LatteTransformer3DModel")
    assert facts["supported"]
    assert facts["cost"] is None


def test_a_folder_of_a_model(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "transformer"):
        facts = probe(str(folder))
        assert facts["class"] == "DiTTransformer2DModel"
        assert facts["grid"] == (1, 8, 8)


def test_an_unsupported_class_says_what_is_missing():
    facts = probe("UNet2DModel")
    assert not facts["supported"]
    assert {"module that makes tokens", "positions"} <= set(facts["missing"])
    assert facts["nearest"]


def test_nonsense_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'NoSuchModel' is no diffusers model class.*legal"):
        probe("NoSuchModel")
    with pytest.raises(FileNotFoundError, match="has no config"):
        probe(str(tmp_path))
