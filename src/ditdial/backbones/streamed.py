"""Which parts of a block see which token grid: what sparse modes need to know of a model class.

A backbone names them once. Everything else in a block works token by token, on whichever tokens
the block is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """The blocks of a class, and where tokens meet in them.

    Args:
        blocks: lists of blocks in the order they run.
        norms: what attention is given comes from the one of these modules that a block has.
        attention: modules of a block, as far as it has them, where picture tokens attend to each
            other, and how they do (see `ditdial.backbones.blocks.BlockList`).
        arguments: of those modules, as far as the block passes them by place.
        phases: the one that holds rotary phases, of text tokens first where these are turned too.
        parallel: module that is given what attention is given, if there is one.
        beside: list of blocks across frames, each of which runs behind one of ``blocks``, on the
            grid that it leaves.
        pools_first: the first block must be a pool block: something is added to its output that
            tokens of both grids need.
    """

    blocks: tuple[str, ...] = ("transformer_blocks",)
    norms: tuple[str, ...] = ("norm1",)
    attention: tuple[tuple[str, str], ...] = (("attn1", "self"),)
    arguments: tuple[str, ...] = ("hidden_states",)
    phases: str | None = None
    parallel: str | None = None
    beside: str | None = None
    pools_first: bool = False

    @property
    def joint(self) -> bool:
        """Whether picture and text tokens attend together."""
        return any(kind == "joint" for _, kind in self.attention)

    def of(self, model: Any) -> list[Any]:
        """The blocks in the order they run."""
        return [block for name in self.blocks for block in model.get_submodule(name)]

    def norm_of(self, block: nn.Module) -> nn.Module:
        """The module that normalises what attention is given."""
        name = next(name for name in self.norms if name in block._modules)
        return block.get_submodule(name)

    def attention_of(self, block: nn.Module) -> list[tuple[Any, str]]:
        """The attentions of a block, and how their tokens see each other."""
        found = [(block._modules.get(name), kind) for name, kind in self.attention]
        return [(module, kind) for module, kind in found if module is not None]

    def roles(self, planned: Sequence[str]) -> tuple[str, ...]:
        """Of all blocks that the plan of the ones in ``blocks`` gives a role, those beside too.

        Args:
            planned: roles of the blocks in ``blocks`` (see `ditdial.cost.blocks.ROLES`).
        """
        thinned = ("generate", "gather", "sparse")
        beside = ("sparse" if role in thinned else "dense" for role in planned)
        return (*planned, *(() if self.beside is None else beside))
