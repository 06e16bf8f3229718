"""What whole runs cost: the published figures, and what SparseDiT's plan cannot save."""

from __future__ import annotations

import json

import pytest
from tests.cli.test_cli import run

from ditdial import FULL, DyDiT, FlexiDiT, Mode, PPFlow, Schedule, SparseDiT
from ditdial.methods.sparsedit import STAGES_256
from ditdial.published.costs import as_published, run_cost, sparse_plan
from ditdial.published.models import published_model, published_shape

XL, LARGE = (published_model(name).shape(SparseDiT()) for name in ("dit-xl-2-256", "dit-xl-2-512"))


@pytest.mark.parametrize(
    ("weak", "weak_guide", "percent"), [(120, 120, 64), (180, 180, 46), (220, 250, 29)]
)
def test_published_compute_of_flexidit(weak, weak_guide, percent):
    """Powerful for the last 130/130, 70/70 and 30/0 of 250 steps (spec 0.1)."""
    schedule = Schedule.weak_first(weak / 250, 2, guide_fraction=weak_guide / 250)
    facts = run_cost("dit-xl-2-256", FlexiDiT(), schedule, merged=True)
    assert 100 * facts["ratio_blocks"] == pytest.approx(percent, abs=0.5)
    assert 100 * facts["ratio"] == pytest.approx(percent, abs=0.5)
    assert facts["macs_full"] == published_shape("dit-xl-2-256").macs(FULL)
    assert facts["flops_plan"] == 2 * facts["macs_plan"]


PPFLOW = (  # model, stages, percent of the base's cost in the paper's table, ours, why they differ
    ("dit-xl-2-256", 3, 49.4, 49.44, "rounding"),
    ("dit-b-2-256", 2, 62.0, 62.01, "rounding"),
    ("dit-b-2-256", 3, 49.1, 49.18, "cut off, not rounded"),
    # The paper's text has 37.8 % saved, which is ours. The linear layers alone take 62.6.
    ("dit-xl-2-256", 2, 62.6, 62.17, "attention not counted"),
    # See the lab notes: no count of these stages gives it; 38.7 % is what they save.
    ("dit-xl-2-512", 2, 58.7, 61.29, "not explained"),
)


@pytest.mark.parametrize(("model", "levels", "published", "ours", "why"), PPFLOW)
def test_published_compute_of_ppflow(model, levels, published, ours, why):
    """Half the noise levels with patches of 4 x 4, of three levels a quarter with 2 x 4.

    SiT has DiT's shapes. The paper counts blocks, "99.8 %" of the whole.
    """
    stages = ((0.5, 2), (0.25, (1, 1, 2)))[: levels - 1]
    facts = run_cost(model, PPFlow(stages=stages), steps=1000)
    assert 100 * facts["ratio_blocks"] == pytest.approx(ours, abs=0.006)
    apart = {"rounding": 0.05, "cut off, not rounded": 0.1}.get(why)
    if apart is not None:
        assert ours == pytest.approx(published, abs=apart)
    tokens = [1024, 256] if model.endswith("512") else [256, 64, 128][:levels]
    assert list(facts["tokens"].values()) == tokens


def block_count(tokens: int, width: int, *, attention: bool) -> float:
    """Multiply-adds of a block, and of nothing that does not grow with its tokens."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width * attention


def two_stages(tokens: int, fraction: float = 0.5, *, attention: bool = True) -> float:
    """Percent of the cost, with a quarter of the tokens for a fraction of the steps."""
    few, all_ = (block_count(n, 1152, attention=attention) for n in (tokens // 4, tokens))
    return 100 * (1 - fraction * (1 - few / all_))


def test_what_might_explain_the_published_compute_of_ppflow_at_512():
    """None of the ways to count, and two slips."""
    assert two_stages(256) == pytest.approx(62.2, abs=0.05)
    assert two_stages(256, attention=False) == 62.5  # 62.6 with what does not narrow
    assert two_stages(1024) == pytest.approx(100 - 38.7, abs=0.05)
    assert two_stages(1024, attention=False) == 62.5
    for steps in (15, 30):  # even times from 0, of which half and less are coarse
        coarse = sum(2 * i <= steps for i in range(steps))
        assert two_stages(1024, coarse / steps) == pytest.approx(58.7, abs=0.05)


DYDIT = {  # G multiply-adds of the base, and by target its table 8 and the share that these leave
    "dit-s-2-256": (
        6.07,
        {
            0.9: (5.72, 0.944),
            0.8: (4.94, 0.815),
            0.7: (4.34, 0.716),
            0.5: (3.16, 0.520),
            0.4: (2.63, 0.432),
            0.3: (1.96, 0.321),
        },
    ),
    "dit-b-2-256": (
        23.02,
        {
            0.9: (21.28, 0.924),
            0.8: (18.53, 0.805),
            0.7: (16.28, 0.707),
            0.5: (11.90, 0.516),
            0.4: (9.71, 0.420),
            0.3: (7.51, 0.324),
        },
    ),
    "dit-xl-2-256": (
        118.69,
        {0.7: (84.33, 0.710), 0.6: (67.83, 0.571), 0.5: (57.88, 0.487), 0.3: (38.85, 0.326)},
    ),
}


@pytest.mark.parametrize("model", DYDIT)
def test_published_costs_of_dydit(model):
    """The base from its shapes; of a narrow model, the share of its blocks that the table implies.

    Which heads and channels trained routers keep follows from no shape, so the table of narrow
    models cannot be counted, only read: with what does not narrow taken away (0.02 G for S, 0.06
    for B, 0.29 for XL, by the shapes), each row says what share of the blocks was left in. That is
    within 0.045 of the target, where the paper's squared penalty ended. Its rows count no routers.
    """
    base, by_target = DYDIT[model]
    shape = published_model(model).shape(DyDiT(tokens=False))
    full, blocks = shape.macs(FULL) / 1e9, shape.block_macs(FULL) / 1e9
    assert full == pytest.approx(base, rel=2e-3)
    for target, (published, share) in by_target.items():
        left = (published - (full - blocks)) / blocks
        assert left == pytest.approx(share, abs=1e-3)
        assert left == pytest.approx(target, abs=0.045)


@pytest.mark.parametrize("model", DYDIT)
def test_blocks_that_keep_whole_heads_and_channels_cost_what_their_matrices_do(model):
    """Half of the heads and groups: their matrices, against what a plan says."""
    known = published_model(model)
    (_, height, width), config = known.grid, known.config
    n, heads = height * width, config["num_attention_heads"]
    d = heads * config["attention_head_dim"]
    attention = 4 * n * d * (d // 2) + 2 * n * n * (d // 2)
    forward = 2 * n * d * (4 * d // 2)
    shape = known.shape(DyDiT(tokens=False))
    rest = shape.macs(FULL) - shape.block_macs(FULL)
    facts = run_cost(model, DyDiT(tokens=False), Schedule.constant(Mode(width=0.5)), steps=1)
    counted = rest + config["num_layers"] * (attention + forward)
    assert facts["macs_plan"] == pytest.approx(counted, rel=1e-12)


def test_what_routers_of_tokens_cost():
    """Half a percent of each block; with half of the tokens, all their channels are left in."""
    for mode in (Mode(width=0.5), Mode(width=0.5, token_keep=0.5)):
        facts = run_cost("dit-xl-2-256", DyDiT(), Schedule.constant(mode), steps=1)
        assert facts["ratio_blocks"] == pytest.approx(0.505, abs=5e-4)


def test_low_rank_updates_cost_unless_merged():
    apart, merged = (
        run_cost("pixart-alpha-256", FlexiDiT(rank=16), Schedule.constant(Mode(2)), merged=each)
        for each in (False, True)
    )
    assert apart["macs_full"] == merged["macs_full"]
    d, depth, tokens = 1152, 28, 64
    added = apart["macs"]["patch2"] - merged["macs"]["patch2"]
    assert added == 16 * tokens * depth * (4 * 2 * d + 2 * 5 * d)


SPARSE = (  # model, sides from noise to data, G multiply-adds of the paper's table, how near, why
    ("dit-xl-2-256", (6, 7, 8, 10), 68.05, 2e-3, "the paper's sides are ours to infer"),
    ("dit-b-2-256", (6, 7, 8, 10), 14.34, 2e-3, "the same"),
    ("dit-xl-2-512", (6, 7, 8, 10), 235, 3e-3, "given in whole G"),
    ("dit-xl-2-512", (12, 14, 15, 20), 286, 2e-3, "given in whole G"),
    ("dit-xl-2-512", (12, 14, 16, 20), 286, 1e-2, "one of the sides twice that at 256"),
)


@pytest.mark.parametrize(("model", "sides", "gmacs", "apart", "why"), SPARSE)
def test_published_costs(model, sides, gmacs, apart, why):
    """From shapes, as the paper counts; our own is lower by what need not be multiplied.

    Sides are those of its rates, rounded, the two inner ones by what its MACs leave. The 88.91 G
    for rates of 0.44 to 0.61 fit no sides of this plan: 12 throughout, the most, takes 89.6.
    """
    most = as_published(XL).macs(Mode(token_grid=12)) / 1e9
    assert most == pytest.approx(89.6, abs=0.05)
    facts = run_cost(model, sparse_plan(model, sides))
    assert facts["macs_plan_published"] / 1e9 == pytest.approx(gmacs, rel=apart), why
    assert 0.94 < facts["macs_plan"] / facts["macs_plan_published"] < 0.98


def test_published_costs_of_pixart():
    """The base to half a percent; its plan is not published, and ours comes 2.6 % lower."""
    facts = run_cost("pixart-alpha-256", sparse_plan("pixart-alpha-256"))
    assert facts["macs_full"] / 1e9 == pytest.approx(148.73, rel=5e-3)
    assert facts["macs_plan_published"] / 1e9 == pytest.approx(91.62, rel=0.03)


@pytest.mark.parametrize(("shape", "floor"), [(XL, 56.4), (LARGE, 58.3)])
def test_one_sparse_token_still_leaves_two_fifths_of_the_work(shape, floor):
    """Ten of the 28 blocks stay dense, whatever the grid: more saving needs another plan."""
    saved = 1 - as_published(shape).block_macs(Mode(token_grid=1)) / shape.block_macs(FULL)
    assert 100 * saved == pytest.approx(floor, abs=0.1)


def test_the_dense_grid_saves_attention_of_pooling_blocks_only():
    d, n = 1152, 256
    saved = XL.macs(FULL) - XL.macs(Mode(token_grid=16))
    pooling = 2 * (4 * (n - 1) * d * d + 2 * (n * n - 1) * d)
    assert saved == pooling - 4 * 2 * n * d * d  # less the merges of four modules


def test_patch_and_grid_are_counted_together():
    both = Mode(2, token_grid=8)
    assert LARGE.block_macs(both) == XL.block_macs(Mode(token_grid=8))
    assert LARGE.macs(both) < LARGE.macs(Mode(2))


def test_the_other_published_models_have_plans():
    for name in ("pixart-alpha-256", "latte-1-512", "wan-2.1-1.3b-480p"):
        facts = run_cost(name, sparse_plan(name))
        assert 0.35 < facts["ratio"] < facts["ratio_published"] < 0.65
    for name in ("sd3-medium-1024", "flux-1-dev-1024"):
        plan = sparse_plan(name)
        facts = run_cost(name, plan)
        assert plan.pool == 0
        assert 0.4 < facts["ratio"] < facts["ratio_published"] < 0.8


def test_illegal_questions_are_named():
    with pytest.raises(ValueError, match=r"sides = \(6, 7\); legal: 4, the noisiest"):
        sparse_plan("dit-xl-2-256", (6, 7))
    with pytest.raises(ValueError, match=r"sides = \(6, 7, 8, 20\); legal: at most 16"):
        sparse_plan("dit-xl-2-256", (6, 7, 8, 20))
    with pytest.raises(
        ValueError, match="ZImageTransformer2DModel has no sparse modes; legal: dit"
    ):
        sparse_plan("z-image-1024")
    with pytest.raises(ValueError, match="steps = 0; legal: >= 1"):
        run_cost("dit-xl-2-256", FlexiDiT(), steps=0)
    with pytest.raises(ValueError, match=r"unknown model 'dit-xxl'; legal: dit-s-2-256, .*512"):
        run_cost("dit-xxl", FlexiDiT())
    with pytest.raises(ValueError, match="are 28 blocks; legal: 12"):
        run_cost("dit-b-2-256", SparseDiT(stages=STAGES_256))
    with pytest.raises(ValueError, match="'grid2' has a sparse grid, and the plan of its blocks"):
        published_shape("dit-xl-2-256").macs(Mode(token_grid=2))


def test_the_command_prints_both_countings(monkeypatch, capsys):
    arguments = ("cost", "--model", "dit-xl-2-256", "--method", "sparsedit", "--json")
    code, out, _ = run(monkeypatch, capsys, *arguments)
    facts = json.loads(out)
    assert code == 0
    assert facts["macs_plan_published"] / 1e9 == pytest.approx(68.05, rel=0.01)
    assert facts["macs_plan"] / 1e9 == pytest.approx(65.4, rel=0.01)
    assert list(facts["macs"]) == ["full", "grid6", "grid7", "grid8", "grid10"]
    code, _, err = run(monkeypatch, capsys, *arguments, "--sides", "6,x")
    assert (code, "sides = '6,x'; legal: numbers" in err) == (2, True)
    code, _, err = run(monkeypatch, capsys, *arguments[:3], "--method", "toad")
    assert (code, "method = 'toad'; legal: flexidit, sparsedit" in err) == (2, True)
