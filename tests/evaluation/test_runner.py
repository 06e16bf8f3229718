"""Figures come with their noise over disjoint seed sets."""

from __future__ import annotations

import math

import pytest
import torch

from ditdial.evaluation.distances import FeatureStatistics
from ditdial.evaluation.features import SmallClassifier, load_features
from ditdial.evaluation.runner import Figure, Judge, as_row, save_reference_set


@pytest.fixture
def judge(tmp_path):
    torch.manual_seed(0)
    folder = str(tmp_path / "classifier")
    SmallClassifier(in_channels=1, num_classes=10, width=8, feature_dim=8).save_pretrained(folder)
    network, _ = load_features(folder)
    save_reference_set(network, torch.rand(200, 1, 32, 32), tmp_path / "real.safetensors")
    return Judge.load(folder, tmp_path / "real.safetensors")


def test_figure_is_mean_and_its_standard_error():
    assert Figure.over([1.0, 3.0]) == Figure(2.0, pytest.approx(1.0), (1.0, 3.0))
    assert math.isnan(Figure.over([1.0]).noise)


def test_difference_is_paired_by_set():
    difference = Figure.over([1.0, 3.0, 8.0]).minus(Figure.over([0.5, 2.5, 7.5]))
    assert difference == Figure(0.5, 0.0, (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"number of sets = 2.*legal: 3"):
        Figure.over([1.0, 2.0, 3.0]).minus(Figure.over([1.0, 2.0]))


def test_all_figures(judge):
    torch.manual_seed(1)
    images, labels = torch.rand(120, 1, 32, 32), [0] * 120
    figures = judge.judge(images, labels, sets=3, full=(images + 0.1).clamp(0, 1))
    assert set(figures) == {"frechet", "kernel", "accuracy", "psnr", "ssim"}
    row = as_row(figures, name="x")
    assert row["name"] == "x"
    assert row["psnr"] == pytest.approx(20, abs=2)
    assert row["frechet_noise"] > 0
    assert sum(row["frechet_sets"]) / 3 == pytest.approx(row["frechet"])


def test_same_distribution_is_nearer_than_another(judge):
    torch.manual_seed(2)
    labels = [0] * 100
    near = judge.judge(torch.rand(100, 1, 32, 32), labels, sets=1)["frechet"].value
    far = judge.judge(torch.zeros(100, 1, 32, 32) + 0.001, labels, sets=1)["frechet"].value
    assert near < far


def test_statistics_are_those_of_the_reference_set(judge):
    assert isinstance(judge.statistics, FeatureStatistics)
    assert judge.statistics.count == 200


@pytest.mark.parametrize(("sets", "labels"), [(0, 8), (5, 8), (2, 7)])
def test_bad_arguments(judge, sets, labels):
    with pytest.raises(ValueError, match="legal"):
        judge.judge(torch.rand(8, 1, 32, 32), [0] * labels, sets=sets)
