"""On a CUDA device, in bf16: the identities that the CPU tests check in float32."""

from __future__ import annotations

import pytest
import torch
from tests.elastic_models import run_as

from ditdial import FULL, Mode, Schedule, elastify
from ditdial.plan.execution import Execution
from ditdial.reference import load_reference, reference_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def call():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 32, 32, generator=generator).to("cuda", torch.bfloat16)
    labels = torch.tensor([1, 2, 3, 4, 10, 10, 10, 10], device="cuda")
    return {
        "hidden_states": x,
        "timestep": torch.full((8,), 500, device="cuda"),
        "class_labels": labels,
    }


@torch.no_grad()
def test_full_mode_is_stock_bit_for_bit(call):
    model = load_reference().transformer.to("cuda", torch.bfloat16)
    stock = model(**call).sample
    elastify(model, reference_adapter("lora"))
    assert torch.equal(model(**call).sample, stock)


@torch.no_grad()
def test_packed_equals_split(call):
    model = load_reference().transformer.to("cuda", torch.bfloat16)
    handle = elastify(model, reference_adapter("lora"))
    handle.schedule = Schedule.constant(FULL, guide=Mode(2), guidance="weak")
    split = model(**call).sample
    run_as(handle, packed=True)
    torch.testing.assert_close(model(**call).sample, split, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_compiled_equals_eager(call):
    model = load_reference().transformer.to("cuda")
    call["hidden_states"] = call["hidden_states"].float()
    handle = elastify(model, reference_adapter("lora"), execution=Execution(merge=True))
    for mode in handle.modes:
        with handle.using(mode):
            eager = model(**call).sample
            model.compile(fullgraph=True)
            torch.testing.assert_close(model(**call).sample, eager, atol=1e-3, rtol=1e-3)


def test_report_times_device_work(call):
    pipe = load_reference().to("cuda")
    handle = elastify(pipe, reference_adapter("lora"), execution=Execution(merge=True))
    handle.schedule = Schedule.weak_first(0.5)
    pipe([1, 2], seeds=[0, 1], num_inference_steps=4, output_type="pt")
    report = handle.report()
    assert len(report.calls) == 4
    assert report.seconds > 0
