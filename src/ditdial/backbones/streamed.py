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

from ditdial.cost.blocks import Linears, SparseBlock
from ditdial.cost.linears import linear_macs


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """The blocks of a class, and where tokens meet in them.

    Args:
        blocks: lists of blocks in the order they run.
        norms: what attention is given comes from the one of these modules that a block has.
        attention: modules of a block, as far as it has them, where picture tokens attend to each
            other, and how they do (see `ditdial.cost.shape.Attention`).
        arguments: of those modules, as far as the block passes them by place.
        phases: the one that holds rotary phases, of text tokens first where these are turned too.
        parallel: module that is given what attention is given, if there is one.
        text: attention to the text.
        apart: layers that picture tokens do not go through, as a regular expression.
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
    text: str | None = None
    apart: str = r"^attn2\.to_[kv]$"
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

    def priced(self, model: Any, roles: Sequence[str], merge: int) -> Iterator[SparseBlock]:
        """What each block multiplies in its role.

        Args:
            merge: multiply-adds of one token in a merging layer.
        """
        for block, role in zip(self.of(model), roles, strict=True):
            yield SparseBlock(
                role=role,
                attention=tuple(
                    (kind, layer.to_q.out_features) for layer, kind in self.attention_of(block)
                ),
                linear=self._linears(block),
                cross=0 if self.text is None else block.get_submodule(self.text).to_q.out_features,
                merge=merge,
            )
        if self.beside is None:
            return
        for block, role in zip(model.get_submodule(self.beside), roles, strict=True):
            layers = self.attention_of(block)
            yield SparseBlock(
                role="sparse" if role in ("generate", "gather", "sparse") else "dense",
                attention=tuple(("temporal", layer.to_q.out_features) for layer, _ in layers),
                linear=self._linears(block),
            )

    def adapted(self, model: Any, units: dict[str, int]) -> Iterator[Linears]:
        """Inputs plus outputs of the adapted layers of each block that `priced` prices.

        Args:
            units: of each adapted layer, by name.
        """
        for name in (*self.blocks, *([self.beside] if self.beside else ())):
            for index in range(len(model.get_submodule(name))):
                yield self._adapted(f"{name}.{index}", units)

    def _linears(self, block: Any) -> Linears:
        query, key = (linear_macs(block, pattern) for pattern in self._patterns())
        rest = linear_macs(block, but=rf"{self.apart}|{'|'.join(self._patterns())}")
        return Linears(query=query, key=key, rest=rest)

    def _patterns(self) -> tuple[str, str]:
        """Layers of queries and of what attention returns; layers of keys and values."""
        owners = "|".join(name for name, _ in self.attention)
        return rf"^({owners})\.(to_q|to_out\.0)$", rf"^({owners})\.to_[kv]$"

    def _adapted(self, block: str, adapted: dict[str, int]) -> Linears:
        start = f"{block}."
        own = {k.removeprefix(start): v for k, v in adapted.items() if k.startswith(start)}
        query, key = (
            sum(units for name, units in own.items() if re.search(pattern, name))
            for pattern in self._patterns()
        )
        return Linears(query=query, key=key, rest=sum(own.values()) - query - key)
