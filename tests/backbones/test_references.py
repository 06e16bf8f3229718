"""Sequences that hold more than the picture to make: exact in full mode, refused in coarse ones."""

from __future__ import annotations

import math

import pytest
import torch
from tests.backbones.tiny import CASES, noise
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditdial import FULL, FlexiDiT, Mode, elastify

TIME, GRID, REFERENCE = 700.0, (1, 6, 8), (1, 4, 5)


def qwenimage():
    """The edit pipelines: reference pictures behind the one to make."""
    call = CASES["qwenimage"].call(2, GRID, TIME)
    return call | {"img_shapes": [[GRID, REFERENCE]] * 2}


def flux2():
    """Reference pictures behind the one to make, at another time."""
    call = CASES["flux2"].call(2, GRID, TIME)
    other = CASES["flux2"].call(2, REFERENCE, TIME)["img_ids"].clone()
    other[..., 0] = 10
    return call | {"img_ids": torch.cat([call["img_ids"], other], dim=1)}


@pytest.mark.parametrize(
    ("name", "build", "argument"),
    [
        ("qwenimage", qwenimage, "img_shapes"),
        ("qwenimage-two-times", qwenimage, "img_shapes"),
        ("flux2", flux2, "img_ids"),
    ],
)
def test_reference_pictures(name, build, argument):
    case, call = CASES[name], build()
    more = noise(2, math.prod(REFERENCE), 16, seed=17)
    call["hidden_states"] = torch.cat([call["hidden_states"], more], dim=1)
    handle, stock = elastify(case.model(), FlexiDiT(scales=(2,))), case.model()
    with torch.no_grad(), handle.using(FULL), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            found = handle.model(**call).sample
        assert torch.equal(found, stock(**call).sample)
    shape = handle._engine.shape(handle.model, handle.backbone.size(handle.model, call))
    assert shape.grid == GRID
    # Of two pictures in a batch, each is modulated by itself.
    assert 2 * shape.macs(FULL) == counter.get_total_flops() / 2
    message = rf"^{argument} name .*; legal with reference pictures: full mode"
    with handle.using(Mode(2)), pytest.raises(ValueError, match=message):
        handle.model(**call)


def test_reference_pictures_kept_by_a_cache():
    """They stand before the picture, of which alone something is predicted."""
    case, call, count = CASES["flux2"], flux2(), math.prod(REFERENCE)
    more = noise(2, count, 16, seed=17)
    call["hidden_states"] = torch.cat([more, call["hidden_states"]], dim=1)
    call["img_ids"] = call["img_ids"].roll(count, dims=1)
    call |= {"kv_cache_mode": "extract", "num_ref_tokens": count}
    handle, stock = elastify(case.model(), FlexiDiT(scales=(2,))), case.model()
    with torch.no_grad(), handle.using(FULL):
        assert torch.equal(handle.model(**call).sample, stock(**call).sample)
    assert handle.backbone.size(handle.model, call) == (GRID, 5, count)
    message = r"^kv_cache_mode = 'extract' .*; legal with them: full mode"
    with handle.using(Mode(2)), pytest.raises(ValueError, match=message):
        handle.model(**call)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("flux", "controlnet_block_samples"),
        ("flux", "controlnet_single_block_samples"),
        ("chroma", "controlnet_block_samples"),
        ("chroma", "controlnet_single_block_samples"),
        ("qwenimage", "controlnet_block_samples"),
    ],
)
def test_controlnet(name, argument):
    case = CASES[name]
    call = case.call(2, GRID, TIME) | {argument: [noise(2, math.prod(GRID), 32, seed=18)]}
    handle, stock = elastify(case.model(), FlexiDiT(scales=(2,))), case.model()
    with torch.no_grad(), handle.using(FULL):
        assert torch.equal(handle.model(**call).sample, stock(**call).sample)
    message = rf"^{argument} holds .* 'patch2' .*; legal together with it: full mode"
    with handle.using(Mode(2)), pytest.raises(ValueError, match=message):
        handle.model(**call)
