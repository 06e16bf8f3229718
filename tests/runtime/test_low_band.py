"""Low-band modes on every class: the stock model's own call of a smaller picture, put back."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from tests.backbones.tiny import CASES
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditdial import FULL, LowBand, Mode, Schedule, elastify
from ditdial.runtime.model_class import engine_of

TIME = 700.0
FLOW = FlowMatchEulerDiscreteScheduler()
DIFFUSION = {
    kind: DDIMScheduler(prediction_type=kind) for kind in ("epsilon", "v_prediction", "sample")
}
BAND = Mode(low_band=2)


class Pipe:
    """As much of a pipeline as says what predictions mean."""

    def __init__(self, model, scheduler):
        self.transformer, self.scheduler = model, scheduler


def elastic(model, scheduler=FLOW, ratios=(2,)):
    pipe = Pipe(model, scheduler)
    return pipe, elastify(pipe, LowBand(ratios=ratios, force=True))


def unpacked(name, latent, grid):
    """Pictures ``(..., H, W)`` of a latent as the class takes it."""
    if latent.ndim != 3:
        return latent
    p = 1 if name.startswith("ltx") else 2
    x = latent.unflatten(1, grid).unflatten(-1, (-1, p, p))  # B T H W C p p
    return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def packed(name, pictures, like):
    if like.ndim != 3:
        return pictures
    p = 1 if name.startswith("ltx") else 2
    B, T, C, H, W = pictures.shape
    x = pictures.reshape(B, T, C, H // p, p, W // p, p).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(B, T * (H // p) * (W // p), C * p * p)


def waves(side):
    k, n = torch.meshgrid(*[torch.arange(side).double()] * 2, indexing="ij")
    found = math.sqrt(2 / side) * torch.cos(math.pi * (2 * n + 1) * k / (2 * side))
    found[0] /= math.sqrt(2)
    return found


def dct(x):
    return waves(x.shape[-2]) @ x.double() @ waves(x.shape[-1]).T


def idct(x):
    return waves(x.shape[-2]).T @ x.double() @ waves(x.shape[-1])


def scales(scheduler, level):
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return 1 - level, level
    share = scheduler.alphas_cumprod.double()[round(level * 1000)].item()
    return share**0.5, (1 - share) ** 0.5


def level_of(scheduler, ratio):
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return 1 / (1 + ratio)
    table = scheduler.alphas_cumprod.double()
    ratios = (table / (1 - table)).sqrt()
    above = int((ratios > ratio).sum())  # the first entry that is noisier
    known = table[above - 1 : above + 1]
    share = ratio**2 / (1 + ratio**2)
    return (above - 1 + ((known[0] - share) / (known[0] - known[1])).item()) / 1000


def by_hand(kind, scheduler, level, x, h, w, small_model):
    """The formulas of the method, with whole transforms, for pictures ``(..., H, W)``."""
    a, s = scales(scheduler, level)
    H, W = x.shape[-2:]
    r = math.sqrt(H * W / (h * w))
    g = a * r + s if kind == "flow_prediction" else math.hypot(a * r, s)
    C = dct(x)
    y = idct(C[..., :h, :w]) / g
    own = r * a / g, s / g
    p = small_model(y.to(x), level_of(scheduler, r * a / s)).double()
    if kind == "flow_prediction":
        clean, noise = y - own[1] * p, y + own[0] * p
    elif kind == "epsilon":
        clean, noise = (y - own[1] * p) / own[0], p
    elif kind == "v_prediction":
        clean, noise = own[0] * y - own[1] * p, own[1] * y + own[0] * p
    else:
        clean, noise = p, (y - own[0] * p) / own[1]
    cleans, noises = torch.zeros_like(C), C / s
    for into, value, factor in ((cleans, clean, r), (noises, noise, 1)):
        into[..., :h, :w] = factor * dct(value)
    clean, noise = idct(cleans), idct(noises)
    if kind == "flow_prediction":
        return noise - clean
    if kind == "v_prediction":
        return a * noise - s * clean
    return noise if kind == "epsilon" else clean


def stacked(found):
    return torch.stack(found) if isinstance(found, list) else found


REFUSED = {
    "wan-token-times": "timestep has different times",
    "ltx-coordinates": "timestep has different times",
    "cogvideox-5b-image": "different resolution",  # the stock model's own words
}
"""Calls that have no smaller form, and what is said of them."""

UNEVEN = {("cogvideox-5b", (3, 7, 6))}
"""Grids whose halves are rounded up, where phases are given for an even share."""

KIND_OF = {"dit": "epsilon", "pixart": "epsilon", "latte": "v_prediction", "cogvideox": "sample"}
"""Models that are tried with another parametrisation than flow matching, beside it."""

FITTING = [
    (name, grid, kind)
    for name, case in CASES.items()
    for grid in case.grids[:2]
    for kind in ("flow_prediction", *({KIND_OF[name]} if name in KIND_OF else ()))
    if name not in REFUSED and (name, grid) not in UNEVEN
]


@pytest.mark.parametrize(("name", "grid", "kind"), FITTING)
@torch.no_grad()
def test_the_call_is_the_stock_models_own_of_a_smaller_picture(name, grid, kind):
    case = CASES[name]
    scheduler = FLOW if kind == "flow_prediction" else DIFFUSION[kind]
    stock, call = case.model(), case.call(2, grid, TIME)
    if name == "pixart":
        call["added_cond_kwargs"]["resolution"] = torch.tensor([[64.0, 32.0]]).repeat(2, 1)
        call["added_cond_kwargs"]["aspect_ratio"] = torch.tensor([[2.0]]).repeat(2, 1)
    if name == "cogview4":
        call["original_size"] = call["target_size"] = torch.tensor([[64.0, 32.0]]).repeat(2, 1)
    small = (grid[0], *(-(-side // 2) for side in grid[1:]))
    latent = stacked(call[case.sample])
    pictures = unpacked(name, latent, grid)
    patch = pictures.shape[-1] // grid[2]
    backwards = name.startswith(("lumina2", "z-image"))
    axis = 2 if name.startswith("cogvideox") else 1
    own = pictures.shape[axis]
    extra = []

    def small_model(y, level):
        own_call = case.call(2, small, 1000 * level)
        if name == "pixart":
            shares = torch.tensor([small[1] / grid[1], small[2] / grid[2]])
            size = torch.tensor([[64.0, 32.0]]) * shares
            own_call["added_cond_kwargs"] = {
                "resolution": size.repeat(2, 1),
                "aspect_ratio": (size[:, :1] / size[:, 1:]).repeat(2, 1),
            }
        if name == "cogview4":
            shares = torch.tensor([small[1] / grid[1], small[2] / grid[2]])
            size = (torch.tensor([[64.0, 32.0]]) * shares).repeat(2, 1)
            own_call["original_size"] = own_call["target_size"] = size
        if name == "cogvideox-5b":  # the pipeline stretches every video over one region
            region = ((0, 0), grid[1:])
            phases = get_3d_rotary_pos_embed(16, region, small[1:], grid[0])
            own_call["image_rotary_emb"] = phases
        y = packed(name, y, latent)
        own_call[case.sample] = list(y) if isinstance(call[case.sample], list) else y
        found = unpacked(name, stacked(stock(**own_call, return_dict=False)[0]), small)
        extra.append(found.narrow(axis, own, found.shape[axis] - own))
        found = found.narrow(axis, 0, own)
        return -found if backwards else found

    expected = by_hand(
        kind, scheduler, TIME / 1000, pictures, small[1] * patch, small[2] * patch, small_model
    )
    expected = -expected if backwards else expected
    (variance,) = extra
    whole = torch.zeros(*variance.shape[:-2], *pictures.shape[-2:], dtype=torch.float64)
    whole[..., : small[1] * patch, : small[2] * patch] = dct(variance) * math.sqrt(
        math.prod(grid[1:]) / math.prod(small[1:])
    )
    expected = packed(name, torch.cat([expected, idct(whole)], dim=axis), latent)
    _, handle = elastic(case.model(), scheduler)
    with handle.using(BAND):
        found = stacked(handle.model(**call, return_dict=False)[0])
    torch.testing.assert_close(found, expected.float(), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_calls_without_a_smaller_form_are_refused_by_name(name):
    case = CASES[name]
    _, handle = elastic(case.model())
    call = case.call(1, case.grids[0], TIME)
    with handle.using(BAND), pytest.raises(ValueError, match=REFUSED[name]):
        handle.model(**call)
    with handle.using(FULL):
        handle.model(**call)


@pytest.mark.parametrize(("name", "grid"), UNEVEN)
@torch.no_grad()
def test_phases_of_an_uneven_share_are_refused(name, grid):
    _, handle = elastic(CASES[name].model())
    with handle.using(BAND), pytest.raises(ValueError, match="no even share"):
        handle.model(**CASES[name].call(1, grid, TIME))


@pytest.mark.parametrize("name", [x for x in CASES if x not in REFUSED])
@torch.no_grad()
def test_a_ratio_that_leaves_the_size_is_the_stock_model(name):
    case = CASES[name]
    call = case.call(2, case.grids[0], TIME)
    _, handle = elastic(case.model(), ratios=(1.01,))
    with handle.using(Mode(low_band=1.01)):
        found = stacked(handle.model(**call, return_dict=False)[0])
    with handle.using(FULL):
        expected = stacked(handle.model(**call, return_dict=False)[0])
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "name", [x for x, case in CASES.items() if case.counts_on_meta and x not in REFUSED]
)
@torch.no_grad()
def test_a_pass_costs_what_torch_counts(name):
    case = CASES[name]
    _, handle = elastic(case.model())
    grid = case.grids[0]
    call = case.call(1, grid, TIME)
    engine = engine_of(handle.model)
    forward, counted = engine.passes.compiled.run, []

    def run(model, call):
        with FlopCounterMode(display=False) as counter:
            output = forward(model, call)
        counted.append(counter.get_total_flops() / 2)
        return output

    engine.passes.compiled.run = run
    with handle.using(BAND), sdpa_kernel(SDPBackend.MATH):
        handle.model(**call)
    shape = engine.shape(handle.model, handle.backbone.size(handle.model, call))
    assert counted == [shape.macs(BAND)]
    assert handle.report().calls[-1].macs == counted[0]
    assert shape.tokens(BAND) == shape.at(BAND).tokens(FULL)


@torch.no_grad()
def test_a_compiled_model_has_a_graph_for_each_size():
    torch._dynamo.reset()
    case = CASES["sd3"]
    pipe, handle = elastic(case.model())
    handle.schedule = Schedule.weak_first(0.5, BAND)
    calls = [case.call(1, (1, 8, 8), time) for time in (900.0, 800.0, 300.0, 200.0)]
    expected = [handle.model(**call).sample for call in calls]
    counter = CompileCounterWithBackend("eager")
    handle.model.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        for call, wanted in zip(calls, expected, strict=True):
            torch.testing.assert_close(handle.model(**call).sample, wanted)
    assert counter.frame_count == 2
    assert pipe.transformer is handle.model  # the pipeline, which tells what is predicted, lives


def test_a_graph_around_the_model_is_refused():
    torch._dynamo.reset()
    case = CASES["sd3"]
    _, handle = elastic(case.model())
    handle.schedule = Schedule.constant(BAND)
    around = torch.compile(lambda call: handle.model(**call).sample, backend="eager")
    whole = torch.compile(lambda call: handle.model(**call).sample, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="legal there: modes of the latent's own size"):
        whole(case.call(1, (1, 8, 8), TIME))
    with torch.no_grad():
        around(case.call(1, (1, 8, 8), TIME))


def test_rows_of_several_noise_levels_are_refused():
    case = CASES["sd3"]
    _, handle = elastic(case.model())
    call = case.call(2, (1, 8, 8), TIME) | {"timestep": torch.tensor([900.0, 800.0])}
    with handle.using(BAND), pytest.raises(ValueError, match="rows of one noise level"):
        handle.model(**call)


def test_gradients_reach_the_latent_through_the_band():
    case = CASES["sd3"]
    _, handle = elastic(case.model())
    call = case.call(1, (1, 8, 8), TIME)
    call["hidden_states"].requires_grad_()
    with handle.using(BAND):
        handle.model(**call).sample.square().sum().backward()
    assert call["hidden_states"].grad.abs().min() > 0


@torch.no_grad()
def test_half_precision_in_half_precision_out():
    case = CASES["flux"]
    _, handle = elastic(case.model().bfloat16())
    call = {
        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in case.call(1, (1, 8, 8), TIME).items()
    }
    with handle.using(BAND):
        found = handle.model(**call).sample
    assert found.dtype == torch.bfloat16
    _, exact = elastic(case.model().bfloat16().float())
    call = {
        k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()
    }
    with exact.using(BAND):
        right = exact.model(**call).sample
    assert (found.float() - right).abs().max() < 0.1 * right.abs().max()
