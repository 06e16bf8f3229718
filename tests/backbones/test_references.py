"""Sequences with more than the picture to make, and what control networks add to tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.backbones.tiny import CASES, noise
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditdial import FULL, FlexiDiT, Mode, elastify
from ditdial.ops.patching import coarse_grid, group_means, ungroup

TIME, GRID, REFERENCE, LAYERS = 700.0, (1, 6, 8), (1, 4, 5), (3, 6, 8)

LAYERED = {"use_layer3d_rope": True, "use_additional_t_cond": True}
KNOWN = CASES | {
    "qwenimage-layers": replace(CASES["qwenimage"], config=CASES["qwenimage"].config | LAYERED)
}


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


def flux():
    """FLUX Kontext: a reference picture behind the one to make, told apart by the first id."""
    call = CASES["flux"].call(2, GRID, TIME)
    other = CASES["flux"].call(2, REFERENCE, TIME)["img_ids"].clone()
    other[:, 0] = 1
    return call | {"img_ids": torch.cat([call["img_ids"], other])}


def layered():
    """Layers that are made together, and the picture that they are made of."""
    call = CASES["qwenimage"].call(2, LAYERS, TIME)
    call["hidden_states"] = noise(2, math.prod(LAYERS), 16)
    call["additional_t_cond"] = torch.zeros(2, dtype=torch.long)
    return call | {"img_shapes": [[GRID] * LAYERS[0] + [REFERENCE]] * 2}


sequences = pytest.mark.parametrize(
    ("name", "build", "grid"),
    [
        ("qwenimage", qwenimage, GRID),
        ("qwenimage-two-times", qwenimage, GRID),
        ("qwenimage-layers", layered, LAYERS),
        ("flux2", flux2, GRID),
        ("flux", flux, GRID),
    ],
)


def with_reference(call):
    """A call with the latents of a reference picture behind its own."""
    more = noise(2, math.prod(REFERENCE), 16, seed=17)
    return call | {"hidden_states": torch.cat([call["hidden_states"], more], dim=1)}


@sequences
@pytest.mark.parametrize("mode", [FULL, Mode(2), Mode(3)], ids=str)
def test_reference_pictures_cost_what_they_multiply(name, build, grid, mode):
    case, call = KNOWN[name], with_reference(build())
    handle, stock = elastify(case.model(), FlexiDiT(scales=(2, 3))), case.model()
    with torch.no_grad(), handle.using(mode), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            found = handle.model(**call).sample
        if mode.is_full:
            assert torch.equal(found, stock(**call).sample)
    assert found.shape == stock(**call).sample.shape
    shape = handle._engine.shape(handle.model, handle.backbone.size(handle.model, call))
    assert shape.grid == grid
    # Of two pictures in a batch, each is modulated by itself.
    assert 2 * shape.macs(mode) == counter.get_total_flops() / 2


def run_watched(handle, call, mode):
    """What the first block is given, and what enters and leaves the last layer."""
    seen = {}
    block = handle.model.transformer_blocks[0]
    hooks = [
        block.register_forward_pre_hook(lambda *given: seen.update(given[2]), with_kwargs=True),
        handle.model.proj_out.register_forward_hook(
            lambda _, given, made: seen.update(last=given[0], output=made)
        ),
    ]
    with torch.no_grad(), handle.using(mode):
        handle.model(**call)
    for hook in hooks:
        hook.remove()
    return seen


def image_phases(seen, text):
    """Rotary phases of the picture's tokens, as a pair."""
    phases = seen["image_rotary_emb"]
    if phases[0].is_complex():  # Qwen-Image: of the picture, of the text
        return phases[0].real, phases[0].imag
    return [part[text:] for part in phases]


@sequences
def test_reference_pictures_keep_their_tokens_and_places_in_coarse_modes(name, build, grid):
    case, call = KNOWN[name], with_reference(build())
    handle = elastify(case.model(), FlexiDiT(scales=(2,)))
    base, coarse = math.prod(grid), math.prod(coarse_grid(grid, (1, 2, 2)))
    full, weak = (run_watched(handle, call, mode) for mode in (FULL, Mode(2)))
    assert weak["hidden_states"].shape[1] == coarse + math.prod(REFERENCE)
    assert torch.equal(weak["hidden_states"][:, coarse:], full["hidden_states"][:, base:])
    text = call["encoder_hidden_states"].shape[1]
    pairs = zip(image_phases(full, text), image_phases(weak, text), strict=True)
    for stock, found in pairs:
        assert torch.equal(found[coarse:], stock[base:])
        assert len(found) == coarse + math.prod(REFERENCE)
    layer = case.model().proj_out
    with torch.no_grad():
        assert torch.equal(weak["output"][:, base:], layer(weak["last"][:, coarse:]))


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
    case, residual = CASES[name], noise(2, math.prod(GRID), 32, seed=18)
    call = case.call(2, GRID, TIME) | {argument: [residual]}
    handle, stock = elastify(case.model(), FlexiDiT(scales=(2,))), case.model()
    with torch.no_grad(), handle.using(FULL):
        assert torch.equal(handle.model(**call).sample, stock(**call).sample)
    with torch.no_grad(), handle.using(Mode(2)):
        found = handle.model(**call).sample
        # To a group of equal tokens the same is added as to each of them.
        means = group_means(residual, GRID, (1, 2, 2))
        spread = ungroup(means.repeat(1, 1, 4), GRID, (1, 2, 2))
        even = handle.model(**call | {argument: [spread]}).sample
        bare = handle.model(**case.call(2, GRID, TIME)).sample
    torch.testing.assert_close(found, even)
    assert not torch.allclose(found, bare)
