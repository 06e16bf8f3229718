"""SparseDiT, first posted as FlexDiT (2412.06028): fewer tokens in the middle of the depth.

The depth is cut in three (section 3). The first blocks replace attention by an average over all
tokens. The middle is a row of sparse-dense modules: a *generate* block attends from a small grid of
averaged tokens to the dense ones, *sparse* blocks see the small grid alone, a *recover* block
attends from the dense grid, merged with the sparse tokens, to the sparse ones, and *dense* blocks
run as ever. The last blocks stay dense. The sparse grid grows from stage to stage of the noise
level. Depth and weights are those of the base, block by block.

What blocks are given is in `ditdial.layers.token_grids`. New are, for each module, two linear
layers that merge the grids and two gates for positions. They start so that a merge returns the
dense tokens.

Shape legend: B batch, N dense tokens, M sparse tokens, D width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ditdial.backbones.base import Backbone
from ditdial.backbones.streamed import Streamed
from ditdial.cost.blocks import Term
from ditdial.cost.shape import TransformerShape
from ditdial.host.weights import NewLinear
from ditdial.layers.grid_hooks import attach
from ditdial.layers.new_modules import NewModules
from ditdial.layers.state import State
from ditdial.layers.token_grids import TokenGrids
from ditdial.methods.base import Method
from ditdial.ops.patching import Triple, coarse_grid
from ditdial.ops.pooling import UPSAMPLES, Sides, pool_tokens, spread_tokens
from ditdial.plan.mode import FULL, Mode
from ditdial.plan.schedule import Schedule, Segment

Stage = tuple[float, int | Sides]

QUARTERS = (0.75, 0.5, 0.25, 0.0)

STAGES_256: tuple[Stage, ...] = tuple(zip(QUARTERS, (6, 7, 8, 10), strict=True))
"""A quarter of the noise levels each, for 16 x 16 tokens; also the sparser one for 32 x 32."""

STAGES_512: tuple[Stage, ...] = tuple(zip(QUARTERS, (12, 14, 16, 20), strict=True))
"""The denser one for 32 x 32 tokens."""

GROUPS = ((1, 3, 1, 1), (1, 2, 1, 1), (1, 1, 1, 1), (1, 1, 1, 0), (1, 0, 1, 0))
"""Modules that `SparseDiT.for_depth` chooses from, largest first."""


@dataclass(frozen=True, kw_only=True)
class SparseDiT(Method):
    """Configuration.

    The plan must fill the depth: ``pool + modules * sum(group) + top`` blocks. `for_depth` makes
    one; for 28 blocks it is the paper's DiT-XL, which the defaults are too, for 12 its DiT-B.

    Args:
        pool: first blocks, which average instead of attending.
        modules: sparse-dense modules.
        group: generate, sparse, recover and dense blocks of one; generate at least 1, recover 1.
        top: last blocks, which stay dense.
        stages: noisiest first: the noise level where the stage ends, and the sides of its sparse
            grid (a number, or rows and columns). Full mode has what they leave.
        upsample: ``bilinear``, or ``nearest-exact``.
        reposition: add positions again behind gates that start as zero, where the class adds them
            to tokens.
        recipe: ``full`` trains all weights; ``lora`` leaves the base's and gives each grid low-rank
            updates.
        rank: of those.

    Raises:
        ValueError: a value out of range.
    """

    pool: int = 2
    modules: int = 4
    group: tuple[int, int, int, int] = (1, 3, 1, 1)
    top: int = 2
    stages: tuple[Stage, ...] = STAGES_256
    upsample: str = "bilinear"
    reposition: bool = True
    recipe: str = "full"
    rank: int = 16

    name = "sparsedit"
    paper = "SparseDiT (FlexDiT), arXiv 2412.06028"
    recipes = ("full", "lora")
    packs = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", tuple(self.group))
        stages = tuple((end, tuple(k) if isinstance(k, list) else k) for end, k in self.stages)
        object.__setattr__(self, "stages", stages)
        for field, least in (("pool", 0), ("modules", 1), ("top", 0)):
            value = getattr(self, field)
            if type(value) is not int or value < least:
                raise ValueError(f"{field} = {value!r}; legal: a whole number >= {least}")
        group = self.group
        whole = len(group) == 4 and all(type(k) is int and k >= 0 for k in group)
        if not whole or group[0] < 1 or group[2] != 1:
            raise ValueError(
                f"group = {group}; legal: whole numbers (generate >= 1, sparse, recover = 1, dense)"
            )
        ends = [1.0, *(end for end, _ in stages)]
        falling = all(above > below for above, below in zip(ends, ends[1:], strict=False))
        if not stages or not falling or ends[-1] < 0:
            raise ValueError(
                f"stages = {stages}; legal: at least one, each the noise level where it ends "
                "(falling, below 1, the last one not below 0) and the sides of its sparse grid"
            )
        if len(set(self.modes)) < len(stages):
            raise ValueError(f"stages = {stages}; legal: a grid of its own for each")
        if self.upsample not in UPSAMPLES:
            raise ValueError(f"upsample = {self.upsample!r}; legal: {', '.join(UPSAMPLES)}")
        if self.recipe not in self.recipes:
            raise ValueError(f"recipe = {self.recipe!r}; legal: {', '.join(self.recipes)}")
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank = {self.rank!r}; legal: a whole number >= 1")

    @classmethod
    def for_depth(cls, depth: int, **settings: Any) -> SparseDiT:
        """A plan for any depth, after the paper's two.

        From 24 blocks on, two pool and two stay dense at the top, below that one each. Of the
        modules in `GROUPS` that end in a dense block, those that leave the fewest blocks over are
        taken, the larger ones where that is equal. Where two of them do not fit, smaller ones or a
        single one are. What is left stays dense at the top.

        Args:
            settings: others; ``pool`` too, which must be 0 where attention is joint.

        Raises:
            ValueError: fewer than four blocks.
        """
        ends = 2 if depth >= 24 else 1
        pool = settings.get("pool", ends)
        middle = depth - pool - ends
        fitting = [group for group in GROUPS if sum(group) <= middle]
        if not fitting:
            raise ValueError(f"depth = {depth}; legal: at least 4 blocks")
        several = [group for group in fitting if 2 * sum(group) <= middle and group[1]]
        several = [group for group in several if group[3]] or several
        group = min(several or fitting[:1], key=lambda each: middle % sum(each))
        modules, over = divmod(middle, sum(group))
        plan: dict[str, Any] = {
            "pool": pool,
            "modules": modules,
            "group": group,
            "top": ends + over,
        }
        return cls(**{**plan, **settings})

    @property
    def roles(self) -> tuple[str, ...]:
        """What each block of the plan does, in order (see `ditdial.cost.blocks.ROLES`)."""
        generate, sparse, recover, dense = self.group
        module = ["generate"] + ["gather"] * (generate - 1) + ["sparse"] * sparse
        module += ["recover"] * recover + ["dense"] * dense
        return ("pool",) * self.pool + tuple(module) * self.modules + ("dense",) * self.top

    @property
    def modes(self) -> tuple[Mode, ...]:
        return tuple(Mode(token_grid=k) for _, k in self.stages)

    @property
    def low_rank(self) -> int:
        return self.rank if self.recipe == "lora" else 0

    @property
    def trains_base(self) -> bool:
        return self.recipe == "full"

    @property
    def default_schedule(self) -> Schedule:
        """The paper's: a grid for each stage of the noise level, the smallest at the noisiest."""
        edges = [1.0, *(end for end, _ in self.stages)]
        modes: list[Mode] = [*self.modes]
        if edges[-1] > 0:
            edges, modes = [*edges, 0.0], [*modes, FULL]
        return Schedule(
            Segment(start=above, stop=below, mode=mode)
            for above, below, mode in zip(edges, edges[1:], modes, strict=False)
        )

    def build(self, model: nn.Module, backbone: Backbone) -> NewModules:
        self._check_depth(model, backbone)
        return SparseModules(self, model, backbone)

    def _check_depth(self, model: nn.Module, backbone: Backbone) -> Streamed:
        """Where tokens meet in a model that this plan fits.

        Raises:
            ValueError: a plan of another depth, or one that the class cannot run.
        """
        streamed = backbone.streamed
        planned = self.pool + self.modules * sum(self.group) + self.top
        if streamed is None:
            raise ValueError(
                f"method 'sparsedit' does not know where tokens of {backbone.model_class} meet; "
                "legal: classes whose backbone says so (streamed)"
            )
        depth = len(streamed.of(model))
        if planned != depth:
            modules = f"{self.modules} x {self.group}"
            raise ValueError(
                f"pool = {self.pool}, modules {modules} and top = {self.top} are {planned} "
                f"blocks; legal: {depth}, all that the model has (SparseDiT.for_depth({depth}"
                f"{', pool=0' if streamed.joint else ''}) plans them)"
            )
        if streamed.pools_first and not self.pool:
            raise ValueError(f"pool = 0; legal for {backbone.model_class}: at least 1")
        if streamed.joint and self.pool:
            raise ValueError(
                f"pool = {self.pool}; legal for {backbone.model_class}: 0 (its picture and text "
                "tokens attend together, which an average over the picture would not)"
            )
        return streamed

    def priced(
        self, shape: TransformerShape, model: nn.Module, backbone: Backbone
    ) -> TransformerShape:
        roles = self._check_depth(model, backbone).roles(self.roles)
        merges, blocks = (Term(shape.patches.width**2, "merged"),), []
        for block, role in zip(shape.blocks, roles, strict=True):
            terms = block.terms + (merges if role == "recover" else ())
            blocks.append(replace(block, role=role, terms=terms))
        return replace(shape, blocks=tuple(blocks))

    def to_config(self) -> dict[str, Any]:
        return asdict(self)


class SparseModules(NewModules):
    """The merges of the sparse-dense modules, the same for all grids."""

    def __init__(self, method: SparseDiT, model: nn.Module, backbone: Backbone) -> None:
        super().__init__()
        assert backbone.streamed is not None
        self.method, self.streamed = method, backbone.streamed
        kernel, _ = backbone.patches.kernel(model)
        self.merges = nn.ModuleList(
            Merge(len(kernel), {"device": kernel.device, "dtype": kernel.dtype}, method.upsample)
            for _ in range(method.modules)
        )
        if method.reposition and self.streamed.phases is None:
            for merge in self.merges:
                merge.sparse_gate = nn.Parameter(torch.zeros_like(kernel[:, 0, 0, 0, 0]))
                merge.dense_gate = nn.Parameter(torch.zeros_like(kernel[:, 0, 0, 0, 0]))

    def makes_tokens(self, mode: Mode) -> bool:
        return False

    def embed(self, vectors: Tensor, mode: Mode) -> Tensor:
        raise AssertionError("the base makes the tokens of sparse modes")

    def project(self, hidden: Tensor, mode: Mode, grid: Triple) -> Tensor:
        raise AssertionError("the base's output layer is used in sparse modes")

    def attach(self, model: nn.Module) -> list[tuple[nn.Module, RemovableHandle]]:
        return attach(model, self.streamed, self.method.roles, self.merges)

    def grids(
        self, model: nn.Module, backbone: Backbone, state: State, mode: Mode
    ) -> TokenGrids | None:
        if mode.token_grid is None:
            return None
        _, height, width = coarse_grid(state.grid, mode.patch_scale)
        table = None
        if self.method.reposition and self.streamed.phases is None:
            embed = model.get_submodule(backbone.patches.embed)
            table = backbone.positions(embed, state, mode.patch)
        return TokenGrids(self.streamed, (height, width), mode.token_grid, table)


class Merge(nn.Module):
    """From dense tokens to sparse ones and back, in one sparse-dense module.

    Args:
        like: device and dtype.
        upsample: how sparse tokens are spread.
    """

    sparse_gate: nn.Parameter | None
    dense_gate: nn.Parameter | None

    def __init__(self, width: int, like: dict[str, Any], upsample: str) -> None:
        super().__init__()
        self.upsample = upsample
        self.sparse = _linear(torch.zeros(width, width), like)
        self.dense = _linear(torch.eye(width), like)
        self.register_parameter("sparse_gate", None)
        self.register_parameter("dense_gate", None)

    def pooled(self, grids: TokenGrids, dense: Tensor) -> Tensor:
        """Sparse tokens ``(B, M, D)`` of the dense ones ``(B, N, D)``."""
        sparse = pool_tokens(dense, grids.dense, grids.sparse)
        if grids.positions is None or self.sparse_gate is None:
            return sparse
        positions = pool_tokens(grids.positions, grids.dense, grids.sparse)
        return sparse + (self.sparse_gate * positions).to(sparse.dtype)

    def merged(self, grids: TokenGrids, sparse: Tensor, dense: Tensor) -> Tensor:
        """Dense tokens from sparse ones and from those that the module began with.

        The paper spreads first and multiplies then; the other way round is the same, for fewer
        tokens.
        """
        wide = spread_tokens(self.sparse(sparse), grids.sparse, grids.dense, self.upsample)
        merged = wide + self.dense(dense)
        if grids.positions is None or self.dense_gate is None:
            return merged
        return merged + (self.dense_gate * grids.positions).to(merged.dtype)


def _linear(weight: Tensor, like: dict[str, Any]) -> NewLinear:
    layer = NewLinear(weight.shape[1], weight.shape[0], **like)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.zero_()
    return layer
