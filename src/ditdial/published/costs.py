"""What a run of a method costs on a model that is known by its config alone, without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ditdial.backbones import BACKBONES
from ditdial.cost.blocks import Block, Kept, Term
from ditdial.cost.shape import TransformerShape
from ditdial.methods.base import Method
from ditdial.methods.sparsedit import QUARTERS, STAGES_256, STAGES_512, SparseDiT
from ditdial.plain.checks import whole
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.plan import MOST_STEPS, Plan
from ditdial.plan.schedule import Schedule
from ditdial.published.models import MODELS, Published, published_model


def run_cost(
    model: str | Published,
    method: Method,
    schedule: Schedule | None = None,
    *,
    steps: int = 250,
    guidance: bool = True,
    merged: bool = False,
) -> dict[str, Any]:
    """What a run of a method costs on a model.

    Routed modes are taken to keep the share of their name; only trained routers tell the real one.

    Args:
        model: a published one by its name, or any.
        schedule: the method's own by default.
        steps: evenly spaced noise levels.
        guidance: whether the run has a guidance branch.
        merged: low-rank updates are added to the weights beforehand.

    Returns:
        ``macs_full`` and ``macs_plan``, multiply-adds of one picture's forward pass in full mode
        and in the mean over the run, and their FLOPs; ``ratio`` of the two; ``ratio_blocks``, of
        the blocks alone, as the FlexiDiT paper counts; ``tokens`` and ``macs`` by mode. Of sparse
        methods also what their paper counts, ``..._published`` (see `as_published`).

    Raises:
        ValueError: unknown model, a method that does not fit it, or no steps.
    """
    whole("steps", steps, 1, MOST_STEPS)
    known = published_model(model) if isinstance(model, str) else model
    schedule = schedule or method.default_schedule
    bare = known.shape(method, merged=merged)
    shape = replace(bare, kept=lambda mode, level: [_target(mode)] * len(bare.blocks))
    levels = [(steps - 1 - i) / steps for i in range(steps)]

    def ratio(macs: Callable[[Mode, float | None], float]) -> float:
        return Plan.bind(schedule, levels, macs, guidance=guidance).ratio

    modes, full = (FULL, *method.modes), shape.macs(FULL)
    planned = full * ratio(shape.macs)
    facts = {
        "model": model if isinstance(model, str) else known.model_class,
        "method": method.name,
        "steps": steps,
        "macs_full": full,
        "macs_plan": planned,
        "flops_full": 2 * full,
        "flops_plan": 2 * planned,
        "ratio": planned / full,
        "ratio_blocks": ratio(shape.block_macs),
        "tokens": {mode.name: shape.tokens(mode) for mode in modes},
        "macs": {mode.name: shape.macs(mode) for mode in modes},
    }
    if any(mode.is_sparse for mode in method.modes):
        papers = as_published(shape)
        found = ratio(lambda mode, level: (papers if mode.is_sparse else shape).macs(mode, level))
        facts |= {"macs_plan_published": full * found, "ratio_published": found}
    return facts


def _target(mode: Mode) -> Kept:
    """Equal shares of heads and of what enters feed-forwards, in tokens and channels together."""
    tokens = 1 if mode.token_keep is None else mode.token_keep
    return Kept(mode.width, min(1, mode.width / tokens), tokens)


def sparse_plan(model: str, sides: tuple[int, ...] = ()) -> SparseDiT:
    """SparseDiT for a published model, with sparse grids for the four quarters of noise levels.

    Args:
        sides: of the grids, the noisiest quarter's first; the paper's by default.

    Raises:
        ValueError: unknown model, one whose class has no sparse modes, or sides that are not four
            numbers of at most the grid's.
    """
    known = published_model(model)
    streamed, most = BACKBONES[known.model_class].streamed, min(known.grid[1:])
    if streamed is None:
        legal = ", ".join(x for x, each in MODELS.items() if BACKBONES[each.model_class].streamed)
        raise ValueError(f"{known.model_class} has no sparse modes; legal: {legal}")
    if sides and len(sides) != len(QUARTERS):
        raise ValueError(f"sides = {sides}; legal: {len(QUARTERS)}, the noisiest quarter's first")
    if any(side > most for side in sides):
        raise ValueError(f"sides = {sides}; legal: at most {most}")
    default = STAGES_512 if known.grid[1] >= 32 else STAGES_256
    stages = tuple(zip(QUARTERS, sides, strict=True)) if sides else default
    pool = {"pool": 0} if streamed.joint else {}
    return SparseDiT.for_depth(len(streamed.of(known.model())), stages=stages, **pool)


def as_published(shape: TransformerShape) -> TransformerShape:
    """The same, with sparse modes counted as the SparseDiT paper (2412.06028) counts them.

    Its pooling block multiplies a constant N x N matrix with the values of all tokens, which we
    average before; its merge multiplies sparse tokens after they are spread over the dense grid, we
    before. The other modes of this shape mean nothing.
    """
    return replace(shape, blocks=tuple(map(_as_published, shape.blocks)))


def _as_published(block: Block) -> Block:
    if block.role == "pool":
        # Values and outputs of all tokens, no queries and keys; weights times values, no scores.
        halved = ("query", "key", "self", "spatial")
        terms = (x._replace(each=x.each / 2) if x.by in halved else x for x in block.terms)
        return replace(block, role="dense", terms=tuple(terms))
    # Both merging layers multiply as many tokens as the block returns.
    terms = (Term(2 * x.each, "stream") if x.by == "merged" else x for x in block.terms)
    return replace(block, terms=tuple(terms))
