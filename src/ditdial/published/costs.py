"""What a SparseDiT of a published model costs, without weights: our counting and the paper's.

`ditdial.cost.blocks` says where the two differ.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ditdial.backbones import BACKBONES
from ditdial.backbones.streamed import Streamed
from ditdial.cost.blocks import Linears, SparseBlock, SparseCost
from ditdial.cost.shape import SHAPES, TransformerShape
from ditdial.methods.sparsedit import QUARTERS, STAGES_256, STAGES_512, SparseDiT
from ditdial.plan.mode import FULL
from ditdial.plan.plan import Plan
from ditdial.published.models import MODELS, published_shape


def depth_of(name: str) -> int:
    """Blocks that a plan for a published model has.

    Raises:
        ValueError: unknown model, or one whose class has no sparse modes.
    """
    shape = published_shape(name)
    if name in SHAPES:
        return shape.attention[0].blocks
    return len(_streamed(name).of(MODELS[name].model()))


def sparse_shape(name: str, method: SparseDiT) -> TransformerShape:
    """A published model's shape with the blocks of a plan.

    Raises:
        ValueError: as in `depth_of`, or a plan of another depth.
    """
    shape, depth = published_shape(name), depth_of(name)
    if len(method.roles) != depth:
        raise ValueError(f"a plan of {len(method.roles)} blocks for {name!r}; legal: {depth}")
    if name not in SHAPES:
        published = MODELS[name]
        return method.priced(shape, published.model(), BACKBONES[published.model_class]())
    d = shape.width
    linear = Linears(query=2 * d * d, key=2 * d * d, rest=8 * d * d)
    blocks = tuple(
        SparseBlock(role=role, attention=(("self", d),), linear=linear, merge=d * d)
        for role in method.roles
    )
    return replace(shape, sparse=SparseCost(blocks=blocks))


def _streamed(name: str) -> Streamed:
    model_class = MODELS[name].model_class
    streamed = BACKBONES[model_class].streamed
    if streamed is None:
        raise ValueError(f"{model_class} has no sparse modes; legal: {', '.join(SHAPES)}")
    return streamed


def as_published(shape: TransformerShape) -> TransformerShape:
    """The same, counted as the paper counts."""
    assert shape.sparse is not None
    return replace(shape, sparse=replace(shape.sparse, published=True))


def sparsedit_cost(name: str, sides: tuple[int, ...] = (), steps: int = 250) -> dict[str, Any]:
    """What a run of the default schedule costs.

    Args:
        sides: of the sparse grids, noisiest quarter first; the paper's by default.
        steps: evenly spaced.

    Returns:
        ``macs_full`` of one forward pass of one picture, ``macs_plan`` (its mean over the run) and
        ``ratio``, by grid too, and the same as ``..._published`` in the paper's counting.

    Raises:
        ValueError: as in `depth_of`, or sides that are not four numbers of at most the grid's.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}; legal: >= 1")
    grid = published_shape(name).grid
    default = STAGES_512 if grid[1] >= 32 else STAGES_256
    if sides and len(sides) != len(QUARTERS):
        raise ValueError(f"sides = {sides}; legal: {len(QUARTERS)}, the noisiest quarter's first")
    stages = tuple(zip(QUARTERS, sides, strict=True)) if sides else default
    pool = {"pool": 0} if name not in SHAPES and _streamed(name).joint else {}
    method = SparseDiT.for_depth(depth_of(name), stages=stages, **pool)
    if any(side > min(grid[1:]) for side in sides):
        raise ValueError(f"sides = {sides}; legal: at most {min(grid[1:])}")
    shape = sparse_shape(name, method)
    facts: dict[str, Any] = {
        "model": name,
        "method": "sparsedit",
        "plan": {
            "pool": method.pool,
            "modules": method.modules,
            "group": list(method.group),
            "top": method.top,
        },
        "steps": steps,
        "macs_full": shape.macs(FULL),
    }
    levels = [(steps - 1 - i) / steps for i in range(steps)]
    for counted, suffix in ((shape, ""), (as_published(shape), "_published")):
        plan = Plan.bind(method.default_schedule, levels, counted.macs, guidance=False)
        facts[f"macs_plan{suffix}"] = plan.macs / steps
        facts[f"ratio{suffix}"] = plan.ratio
        facts[f"macs_by_grid{suffix}"] = {m.name: counted.macs(m) for m in method.modes}
    return facts
