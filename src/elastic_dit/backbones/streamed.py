"""Which parts of a block see which token grid: what sparse modes need to know of a model class.

A backbone names them once. Everything else in a block works token by token, on whichever tokens
the block is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from elastic_dit.backbones.macs import linear_macs
from elastic_dit.sparse_cost import Linears, SparseBlock


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """The blocks of a class, and where tokens meet in them.

    Args:
        blocks: lists of blocks in the order they run.
        norm: module that normalises what attention is given, inside a block.
        attention: modules where picture tokens attend to each other.
        kind: how they do (see `elastic_dit.cost.Attention`).
        arguments: of those modules, as far as the block passes them by place.
        phases: the one that holds rotary phases.
        text: attention to the text.
        apart: layers that picture tokens do not go through, as a regular expression.
        beside: list of blocks across frames, each of which runs behind one of ``blocks``, on the
            grid that it leaves.
        pools_first: the first block must be a pooling one: something is added to its output that
            tokens of both grids need.
    """

    blocks: tuple[str, ...] = ("transformer_blocks",)
    norm: str = "norm1"
    attention: tuple[str, ...] = ("attn1",)
    kind: str = "self"
    arguments: tuple[str, ...] = ("hidden_states",)
    phases: str | None = None
    text: str | None = None
    apart: str = r"^attn2\.to_[kv]$"
    beside: str | None = None
    pools_first: bool = False

    def of(self, model: Any) -> list[nn.Module]:
        """The blocks in the order they run."""
        return [block for name in self.blocks for block in model.get_submodule(name)]

    def priced(
        self, model: Any, roles: Sequence[str], merge: int, adapted: dict[str, int]
    ) -> Iterator[SparseBlock]:
        """What each block multiplies in its role.

        Args:
            merge: multiply-adds of one token in a merging layer.
            adapted: inputs plus outputs of adapted layers by name.
        """
        names = [f"{name}.{i}" for name in self.blocks for i in range(_count(model, name))]
        for name, role in zip(names, roles, strict=True):
            block = model.get_submodule(name)
            yield SparseBlock(
                role=role,
                kind=self.kind,
                width=sum(block.get_submodule(x).to_q.out_features for x in self.attention),
                linear=self._linears(block),
                adapted=self._adapted(name, adapted),
                cross=0 if self.text is None else block.get_submodule(self.text).to_q.out_features,
                merge=merge,
            )
        for index, role in enumerate(roles if self.beside else ()):
            name = f"{self.beside}.{index}"
            block = model.get_submodule(name)
            yield SparseBlock(
                role="sparse" if role in ("generate", "gather", "sparse") else "dense",
                kind="temporal",
                width=sum(block.get_submodule(x).to_q.out_features for x in self.attention),
                linear=self._linears(block),
                adapted=self._adapted(name, adapted),
            )

    def _linears(self, block: Any) -> Linears:
        query, key = (linear_macs(block, pattern) for pattern in self._patterns())
        rest = linear_macs(block, but=rf"{self.apart}|{'|'.join(self._patterns())}")
        return Linears(query=query, key=key, rest=rest)

    def _patterns(self) -> tuple[str, str]:
        """Layers of queries and of what attention returns; layers of keys and values."""
        owners = "|".join(self.attention)
        return rf"^({owners})\.(to_q|to_out\.0)$", rf"^({owners})\.to_[kv]$"

    def _adapted(self, block: str, adapted: dict[str, int]) -> Linears:
        start = f"{block}."
        own = {k.removeprefix(start): v for k, v in adapted.items() if k.startswith(start)}
        query, key = (
            sum(units for name, units in own.items() if re.search(pattern, name))
            for pattern in self._patterns()
        )
        return Linears(query=query, key=key, rest=sum(own.values()) - query - key)


def _count(model: Any, blocks: str) -> int:
    return len(model.get_submodule(blocks))
