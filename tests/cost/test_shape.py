"""Cost: the published percentages, and the closed form against torch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from tests.backbones.tiny import CASES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditdial import FULL, DyDiT, FlexiDiT, Mode, Plan, Schedule, elastify
from ditdial.backbones.dit import DiTBackbone
from ditdial.cost.blocks import Block, Kept, Term, Tokens
from ditdial.cost.shape import PatchCost, TransformerShape
from ditdial.methods.routers import token_router_macs
from ditdial.published.models import published_shape

XL = published_shape("dit-xl-2-256")
STEPS = 250


def published(weak: int, weak_guide: int, macs) -> float:
    """Percentage of a guided run of 250 steps with so many weak steps per branch."""
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(STEPS)
    levels = [DiTBackbone().times.level_of(t) for t in scheduler.timesteps.tolist()]
    schedule = Schedule.weak_first(weak / STEPS, guide_fraction=weak_guide / STEPS)
    plan = Plan.bind(schedule, levels, macs, guidance=True)
    assert sum(s.mode == Mode(2) for s in plan.steps) == weak
    assert sum(s.guide == Mode(2) for s in plan.steps) == weak_guide
    return 100 * plan.ratio


def test_dit_xl_costs_what_its_paper_says():
    assert XL.macs(FULL) / 1e9 == pytest.approx(118.67, abs=0.01)
    assert (XL.tokens(FULL), XL.tokens(Mode(2))) == (256, 64)
    assert XL.block_macs(Mode(2)) / XL.block_macs(FULL) == pytest.approx(0.2433, abs=1e-4)


@pytest.mark.parametrize(
    ("weak", "weak_guide", "percent"), [(120, 120, 64), (180, 180, 46), (220, 250, 29)]
)
def test_published_compute_of_flexidit(weak, weak_guide, percent):
    """Powerful for the last 130/130, 70/70 and 30/0 steps (spec 0.1)."""
    assert published(weak, weak_guide, XL.block_macs) == pytest.approx(percent, abs=0.5)
    assert published(weak, weak_guide, XL.macs) == pytest.approx(percent, abs=0.5)


@pytest.mark.parametrize(("share", "percent"), [(20, 84.9), (40, 69.7), (60, 54.6), (80, 39.5)])
def test_published_compute_of_weak_shares(share, percent):
    weak = STEPS * share // 100
    assert published(weak, weak, XL.block_macs) == pytest.approx(percent, abs=0.1)


def counted(model, call) -> float:
    """Multiply-adds by torch's counter; the unfused attention is what it can see on the CPU."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**call)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 3, "num_attention_heads": 3, "patch_size": 2, "sample_size": 16},
        {"in_channels": 4, "out_channels": 8, "sample_size": 16, "patch_size": 2},
    ],
)
def test_full_mode_equals_the_counter_on_the_meta_device(changes):
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 1,
        "num_layers": 2,
        "sample_size": 32,
        "patch_size": 4,
        "num_embeds_ada_norm": 10,
        **changes,
    }
    with torch.device("meta"):
        model = DiTTransformer2DModel(**config).eval()
        call = {
            "hidden_states": torch.empty(1, config["in_channels"], *[config["sample_size"]] * 2),
            "timestep": torch.empty(1),
            "class_labels": torch.zeros(1, dtype=torch.long),
        }
        count = counted(model, call)
    backbone = DiTBackbone()
    assert backbone.shape(model, *backbone.default_size(model)).macs(FULL) == count


@pytest.mark.parametrize("recipe", ["lora", "shared"])
@pytest.mark.parametrize("mode", [FULL, Mode(2), Mode(4)])
def test_every_mode_equals_the_counter(make_elastic, make_call, recipe, mode):
    handle, call = make_elastic(recipe=recipe), make_call(1)
    with torch.no_grad(), handle.using(mode):
        handle.model(**call)  # the shared recipe projects its weights once
        assert handle.shape.macs(mode) == counted(handle.model, call)


def test_merged_low_rank_costs_nothing(make_model, make_elastic, make_call):
    handle, call = make_elastic(merge=True), make_call(1)
    with torch.no_grad(), handle.using(Mode(2)):
        handle.model(**call)  # merges once
        assert handle.shape.macs(Mode(2)) == counted(handle.model, call)
    assert handle.shape.updates == ()
    unmerged = elastify(make_model(), FlexiDiT(rank=4)).shape
    assert unmerged.macs(Mode(2)) > handle.shape.macs(Mode(2))
    assert unmerged.macs(FULL) == handle.shape.macs(FULL)


def shape_of(*terms, grid=(1, 8, 8), text=0):
    """Two blocks of these terms, and nothing around them."""
    nothing, blocks = PatchCost(width=0, into=0, out=0), (Block(terms=terms),) * 2
    return TransformerShape(grid=grid, patches=nothing, blocks=blocks, text_tokens=text)


def test_ragged_grids_round_up():
    shape = shape_of(grid=(1, 7, 7))
    assert [shape.tokens(Mode(k)) for k in (1, 2, 4, 7)] == [49, 16, 4, 1]


ATTENTION = {"blocks": 3, "heads": 2, "width": 16}
FRAMES, PER_FRAME, TEXT = 4, 6, 5


def attended(kind):
    """One block's attention as torch runs it: ``(batch, queries, keys)`` of each kind."""
    n = FRAMES * PER_FRAME
    return {
        "self": (1, n, n),
        "joint": (1, n + TEXT, n + TEXT),
        "cross": (1, n, TEXT),
        "spatial": (FRAMES, PER_FRAME, PER_FRAME),
        "temporal": (PER_FRAME, FRAMES, FRAMES),
    }[kind]


@pytest.mark.parametrize("kind", ["self", "joint", "cross", "spatial", "temporal"])
def test_every_kind_of_attention_equals_the_counter(kind):
    batch, queries, keys = attended(kind)
    blocks, heads, width = ATTENTION.values()
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), counter:
        for _ in range(blocks):
            q, k = (torch.empty(batch, heads, n, width) for n in (queries, keys))
            torch.nn.functional.scaled_dot_product_attention(q, k, k)
    block = Block(terms=(Term(2 * heads * width, kind),))
    found = blocks * block.macs(Tokens.on((FRAMES, 1, PER_FRAME), TEXT))
    assert found == counter.get_total_flops() / 2


def test_attention_follows_the_mode_along_the_axes_it_sees():
    """Joining two frames halves what is seen across frames, not what is seen within one."""

    def ratio(kind, scale):
        shape = shape_of(Term(64, kind), grid=(4, 8, 8), text=7)
        return shape.macs(FULL) / shape.macs(Mode(scale))

    for kind, in_time, in_space in (
        ("self", 4, 16),
        ("cross", 2, 4),
        ("spatial", 2, 16),
        ("temporal", 4, 4),
    ):
        assert (ratio(kind, (2, 1, 1)), ratio(kind, 2)) == (in_time, in_space), kind
    assert 2 < ratio("joint", (2, 1, 1)) < 4  # the text stays as long as it is


def test_ragged_grids_round_up_along_every_axis():
    shape = shape_of(grid=(5, 7, 6))
    found = [shape.tokens(Mode(scale)) for scale in (1, 2, (2, 1, 1), (2, 2, 2), (5, 3, 4))]
    assert found == [210, 5 * 4 * 3, 3 * 7 * 6, 3 * 4 * 3, 1 * 3 * 2]


def test_shares_of_heads_channels_and_tokens_multiply():
    """Each term by its tokens and what narrows it; layers that nothing narrows stay whole."""
    terms = (
        Term(2, "self", "heads"),
        Term(10, "query", "heads"),
        Term(100, "entering", "channels"),
        Term(1000, "stream"),
        Term(7, "text", "prompt"),
    )
    tokens, kept = Tokens.on((1, 2, 2), text=3), Kept(0.5, 0.25, 0.75)
    whole = 2 * 16 + 10 * 4 + 100 * 4 + 1000 * 4 + 7 * 3
    narrow = 0.5 * (2 * 16 + 10 * 4) + 0.25 * 100 * 4 + 1000 * 4 + 7 * 3
    assert Block(terms=terms).macs(tokens) == whole
    assert Block(terms=terms).macs(tokens, kept) == narrow
    skips = Block(terms=terms, router=5)
    assert skips.macs(tokens) == whole
    assert skips.macs(tokens, kept) == narrow - 0.25 * 0.25 * 100 * 4 + 5 * 4
    assert skips.narrowing().macs(tokens) == 2 * 16 + 10 * 4 + 100 * 4


BLOCKS_OF_DIT = {  # attention and feed-forward of one block, G multiply-adds (DyDiT)
    "dit-s-2-256": (0.20133, 0.30199),
    "dit-b-2-256": (0.70464, 1.20796),
    "dit-xl-2-256": (1.50995, 2.71791),
}


@pytest.mark.parametrize("model", BLOCKS_OF_DIT)
def test_published_macs_of_one_block(model):
    """What narrows with the heads and what with the channels, as DyDiT's own cost model has it."""
    shape = published_shape(model)
    block, tokens = shape.blocks[0], Tokens.on(shape.grid)
    found = [block.macs(tokens, kept) / 1e9 for kept in (Kept(1, 0, 1), Kept(0, 1, 1))]
    assert found == pytest.approx(BLOCKS_OF_DIT[model], abs=1e-5)


def test_what_tokens_alone_can_save():
    """Skipping alone leaves 35.7 % of the blocks of XL at 256 pixels, and 41.9 % at 512."""
    for model, floor in (("dit-xl-2-256", 0.357), ("dit-xl-2-512", 0.419)):
        shape = published_shape(model)
        blocks = tuple(replace(block, router=1) for block in shape.blocks)
        kept = [Kept(1, 1, 0)] * len(blocks)
        least = replace(shape, blocks=blocks).block_macs(Mode(width=0.5), kept=kept)
        assert least / shape.block_macs(FULL) == pytest.approx(floor, abs=5e-4)


def test_published_macs_of_a_token_router():
    """21.2 M in a block of XL at 256 pixels, half a percent of it."""
    macs = 256 * token_router_macs(1152)
    assert macs / 1e6 == pytest.approx(21.2, abs=0.1)
    assert macs / XL.blocks[0].macs(Tokens.on(XL.grid)) == pytest.approx(0.005, abs=1e-4)


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "wan", "latte"])
@pytest.mark.parametrize("mode", [Mode(width=0.5), Mode(width=0.5, token_keep=0.4)])
def test_counted_macs_of_routed_modes(name, mode):
    """The counter sees fused attention on the meta device alone, and products on any."""
    torch.manual_seed(2)
    handle = elastify(CASES[name].model(), DyDiT(groups=2))
    with torch.no_grad():
        for routers in handle._engine.wiring.new.routers.values():
            for parameter in routers.parameters():
                parameter.copy_(torch.randn(parameter.shape))
    call = CASES[name].call(1, CASES[name].grids[0], 700.0)
    found = {}
    for each in (FULL, mode):
        handle._engine.surgery.widths.begin(())
        with torch.no_grad(), handle.using(each):
            handle.model(**call)  # the routers of the timestep run once per run
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                handle.model(**call)
        found[each] = counter.get_total_flops() / 2, handle.report().calls[-1].macs
    counted, recorded = zip(*found.values(), strict=True)
    assert counted[0] - counted[1] == pytest.approx(recorded[0] - recorded[1], rel=1e-6)
    assert counted[0] > counted[1]
