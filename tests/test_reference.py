"""The shipped reference model is whole, and as good as its card says, on a sample."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel

from ditdial import FULL, Mode, Schedule, elastify
from ditdial.plan.execution import Execution
from ditdial.reference import (
    load_reference,
    reference_adapter,
    reference_folder,
    reference_judge,
    reference_settings,
)
from ditdial.sampling.batches import cyclic_labels, sample


def test_base_is_a_stock_model():
    assert type(load_reference().transformer) is DiTTransformer2DModel


@pytest.mark.parametrize("recipe", ["lora", "shared"])
def test_adapters_fit_and_name_their_training(recipe):
    handle = elastify(load_reference(), reference_adapter(recipe))
    assert handle.modes == (FULL, Mode(2), Mode(4))
    assert handle.schedule.modes > {FULL}


def test_accuracy_and_cheap_run():
    pipe, judge, settings = load_reference(), reference_judge(), reference_settings()
    labels, seeds = cyclic_labels(100, 10), list(range(100))
    steps, (at_full, at_weak) = settings["steps"], (row["scale"] for row in settings["demo"][:2])
    full = sample(pipe, labels, seeds, guidance_scale=at_full, steps=steps, batch_size=100)
    assert judge.judge(full.images, labels, sets=1)["accuracy"].value >= 0.95
    handle = elastify(pipe, reference_adapter("lora"), execution=Execution(merge=True))
    handle.schedule = Schedule.weak_first(0.48)
    weak = sample(pipe, labels, seeds, guidance_scale=at_weak, steps=steps, batch_size=100)
    figures = judge.judge(weak.images, labels, sets=1, full=full.images)
    assert figures["accuracy"].value >= 0.93
    assert figures["psnr"].value > 10
    assert handle.report().ratio == pytest.approx(0.64, abs=0.01)


def test_files_are_small_and_hold_no_pickle():
    files = [p for p in reference_folder().rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md"}
    assert sum(p.stat().st_size for p in files) < 30 * 2**20


def test_unknown_names():
    with pytest.raises(ValueError, match="'svhn'; legal: mnist"):
        reference_folder("svhn")
    with pytest.raises(ValueError, match=r"'rank1'.*legal: ddit, dydit, lora"):
        reference_adapter("rank1")


def test_judging_needs_no_gradient():
    images = torch.rand(20, 1, 32, 32)
    figures = reference_judge().judge(images, cyclic_labels(20, 10), sets=2)
    assert figures["frechet"].value > 10  # noise is far from digits
    assert figures["frechet"].noise >= 0
