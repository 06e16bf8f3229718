"""SparseDiT's cost: published figures in the paper's counting, and what its plan cannot save."""

from __future__ import annotations

import json

import pytest
from tests.cli.test_cli import run

from ditdial import FULL, Mode, SparseDiT
from ditdial.cost.shape import SHAPES, dit_shape
from ditdial.methods.sparsedit import STAGES_256
from ditdial.published.costs import as_published, sparse_shape, sparsedit_cost


@pytest.mark.parametrize(
    ("model", "sides", "gmacs"),
    [
        ("dit-xl-2-256", (6, 7, 8, 10), 68.05),
        ("dit-xl-2-512", (12, 14, 16, 20), 286),
        ("dit-xl-2-512", (12, 14, 15, 20), 286),
        ("dit-xl-2-512", (6, 7, 8, 10), 235),
        ("dit-b-2-256", (6, 7, 8, 10), 14.34),
    ],
)
def test_published_costs(model, sides, gmacs):
    """Spec: each within 1 %; our own counting is lower, by what it does not multiply in vain."""
    facts = sparsedit_cost(model, sides)
    assert facts["macs_plan_published"] / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert 0.94 < facts["macs_plan"] / facts["macs_plan_published"] < 0.98


@pytest.mark.parametrize(("model", "floor"), [("dit-xl-2-256", 56.4), ("dit-xl-2-512", 58.3)])
def test_one_sparse_token_still_leaves_two_fifths_of_the_work(model, floor):
    """Ten of the 28 blocks stay dense, whatever the grid: more saving needs another plan."""
    shape = as_published(sparse_shape(model, SparseDiT()))
    saved = 1 - shape.block_macs(Mode(token_grid=1)) / shape.block_macs(FULL)
    assert 100 * saved == pytest.approx(floor, abs=0.1)


def test_the_dense_grid_saves_attention_of_pooling_blocks_only():
    d, n = 1152, 256
    shape = sparse_shape("dit-xl-2-256", SparseDiT())
    saved = shape.macs(FULL) - shape.macs(Mode(token_grid=16))
    pooling = 2 * (4 * (n - 1) * d * d + 2 * (n * n - 1) * d)
    assert saved == pooling - 4 * 2 * n * d * d  # less the merges of four modules


def test_patch_and_grid_are_counted_together():
    shape = sparse_shape("dit-xl-2-512", SparseDiT())
    coarse = sparse_shape("dit-xl-2-256", SparseDiT())
    both = Mode(2, token_grid=8)
    assert shape.block_macs(both) == coarse.block_macs(Mode(token_grid=8))
    assert shape.macs(both) < shape.macs(Mode(2))


def test_the_other_published_models_have_plans():
    for name in ("pixart-alpha-256", "latte-1-512", "wan-2.1-1.3b-480p"):
        facts = sparsedit_cost(name)
        assert 0.35 < facts["ratio"] < facts["ratio_published"] < 0.65
    for name in ("sd3-medium-1024", "flux-1-dev-1024"):
        facts = sparsedit_cost(name)
        assert facts["plan"]["pool"] == 0
        assert 0.4 < facts["ratio"] < facts["ratio_published"] < 0.8


def test_illegal_questions_are_named():
    with pytest.raises(ValueError, match=r"sides = \(6, 7\); legal: 4, the noisiest"):
        sparsedit_cost("dit-xl-2-256", (6, 7))
    with pytest.raises(ValueError, match=r"sides = \(6, 7, 8, 20\); legal: at most 16"):
        sparsedit_cost("dit-xl-2-256", (6, 7, 8, 20))
    with pytest.raises(ValueError, match="steps = 0"):
        sparsedit_cost("dit-xl-2-256", steps=0)
    with pytest.raises(
        ValueError, match="ZImageTransformer2DModel has no sparse modes; legal: dit"
    ):
        sparsedit_cost("z-image-1024")
    with pytest.raises(ValueError, match="a plan of 28 blocks for 'dit-b-2-256'; legal: 12"):
        sparse_shape("dit-b-2-256", SparseDiT(stages=STAGES_256))
    shape = dit_shape(width=32, depth=2, latent=16, patch=2)
    with pytest.raises(ValueError, match="'grid2' has a sparse grid, and the plan of its blocks"):
        shape.macs(Mode(token_grid=2))
    assert SHAPES["dit-xl-2-256"].sparse is None


def test_the_command_prints_both_countings(monkeypatch, capsys):
    arguments = ("cost", "--model", "dit-xl-2-256", "--method", "sparsedit", "--json")
    code, out, _ = run(monkeypatch, capsys, *arguments)
    facts = json.loads(out)
    assert code == 0
    assert facts["macs_plan_published"] / 1e9 == pytest.approx(68.05, rel=0.01)
    assert facts["macs_plan"] / 1e9 == pytest.approx(65.4, rel=0.01)
    assert list(facts["macs_by_grid"]) == ["grid6", "grid7", "grid8", "grid10"]
    code, _, err = run(monkeypatch, capsys, *arguments, "--sides", "6,x")
    assert (code, "sides = '6,x'; legal: numbers" in err) == (2, True)
    code, _, err = run(monkeypatch, capsys, *arguments[:3], "--method", "toad")
    assert (code, "method = 'toad'; legal: flexidit, sparsedit" in err) == (2, True)
