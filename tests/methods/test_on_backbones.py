"""Every method on every class: shapes, the stock model in full mode, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from tests.backbones.tiny import CASES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditdial import FULL, DDiT, Mode, PPFlow, elastify
from ditdial.backbones import BACKBONES
from ditdial.runtime.tensors import is_new

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
METHODS = {"ddit": DDiT(rank=3), "ppflow": PPFlow(stages=((0.5, 2), (0.25, (1, 1, 2))))}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
TIME = 700.0


def refuses(case, method):
    """DDiT adapts linear feed-forward layers, PPFlow marks a conditioning vector."""
    model = case.model()
    backbone = BACKBONES[case.model_class]()
    backbone.adapts = method.adapts
    if method.low_rank:
        return not list(backbone.low_rank_layers(model))
    return not backbone.conditioning


@torch.no_grad()
def elastic(case, method):
    torch.manual_seed(2)
    handle = elastify(case.model(), method)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in handle.model.named_parameters():
        if is_new(name):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return handle


@torch.no_grad()
def predict(handle, call):
    found = handle.model(**call, return_dict=False)[0]
    return torch.stack(found) if isinstance(found, list) else found


@cases
@methods
def test_full_mode_is_stock_and_coarse_modes_have_its_shape(case, method):
    if refuses(case, method):
        with pytest.raises(ValueError, match=f"method '{method.name}' .*legal: a method that"):
            elastify(case.model(), method)
        return
    handle, stock = elastic(case, method), case.model()
    for grid in case.grids:
        call = case.call(1, grid, TIME)
        with torch.no_grad():
            expected = stock(**call, return_dict=False)[0]
        expected = torch.stack(expected) if isinstance(expected, list) else expected
        with handle.using(FULL):
            assert torch.equal(predict(handle, call), expected)
        for mode in method.modes:
            with handle.using(mode):
                found = predict(handle, call)
            assert found.shape == expected.shape
            assert torch.isfinite(found).all()
            assert not torch.allclose(found, expected)


@cases
@methods
def test_planned_cost_is_what_the_counter_counts(case, method):
    if refuses(case, method):
        pytest.skip("refused, see above")
    handle, grid = elastic(case, method), case.grids[0]
    call = case.call(1, grid, TIME)
    size = handle.backbone.size(handle.model, call)
    for mode in (FULL, *method.modes):
        counter = FlopCounterMode(display=False)
        with handle.using(mode), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
            handle.model(**call)
        shape = handle._engine.shape(handle.model, size)
        assert shape.macs(mode) == counter.get_total_flops() / 2, mode


def test_a_gate_of_video_joins_frames_too():
    case = CASES["wan"]
    handle = elastic(case, DDiT(scales=((2, 1, 1), (2, 2, 2)), rank=3))
    call = case.call(1, (3, 7, 6), TIME)
    for mode in handle.method.modes:
        with handle.using(mode):
            shut = predict(handle, call)
            with torch.no_grad():
                handle._engine.wiring.new.gates[mode.name].add_(1.0)
            assert (predict(handle, call) - shut).abs().max() > 0.1
    assert math.prod(Mode((2, 2, 2)).patch_scale) == 8
