"""Blocks on two token grids: what a sparse mode changes between blocks and inside them (SparseDiT).

Every stock block stays as it is. Hooks in front of some of its modules change what these are given:

- A *pool* block's attention is given one token, the mean of all. A token that sees only itself has
  weight 1, so what it returns is what attention with equal weights would return for every token, at
  the cost of one; the block's residual sum spreads it.
- A *generate* block is given the sparse tokens. Its norm is given those and the dense ones behind
  them, which is the same since it works token by token, and its attention both parts: queries from
  the one, keys and values from the other. Further blocks of that kind are *gather* blocks.
- A *recover* block is given the dense tokens merged with the sparse ones; keys and values come from
  the latter.

In between, blocks simply see fewer tokens. All blocks get the same hooks, which read the role from
the module: torch's compiler reuses the graph of one block for others without a look at their hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elastic_dit.ops.pooling import Sides, pool_phases, rotate_pairs
from elastic_dit.routing import MERGE, ROLE, ROUTER, Router

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from elastic_dit.backbones.streamed import Streamed

Given = tuple[tuple, dict[str, Any]]
"""Positional and named arguments of a module."""

Phases = tuple[Tensor, Tensor]
"""Cosines and sines."""

TWO_GRIDS = ("generate", "gather", "recover")


@dataclass(eq=False)
class Streams:
    """State of one forward pass in a sparse mode.

    Attributes:
        streamed: where tokens meet in the blocks.
        dense, sparse: sides of the two grids.
        positions: position vectors ``(1, N, D)`` of the dense tokens, if they are added again.
        input: the dense tokens that the present sparse-dense module began with.
        other: tokens of the other grid, in a block that sees two.
        tables: rotary phases of the dense tokens and of the sparse ones.
        turns: those of queries and of keys, in a block that sees two grids.
    """

    streamed: Streamed
    dense: Sides
    sparse: Sides
    positions: Tensor | None = None
    input: Tensor | None = None
    other: Tensor | None = None
    tables: tuple[Phases, Phases] | None = None
    turns: tuple[Phases, Phases] | None = None


def attach(
    model: nn.Module,
    streamed: Streamed,
    roles: Sequence[str],
    merges: Iterable[nn.Module],
    router: Router,
) -> list[tuple[nn.Module, RemovableHandle]]:
    """Put the hooks on; they do nothing while the router names no streams.

    Args:
        roles: of the blocks.
        merges: of the sparse-dense modules; each has ``pooled`` and ``merged``.
    """
    put: list[tuple[nn.Module, RemovableHandle]] = []
    ways = iter(merges)

    def before(module: nn.Module, role: str, hook: Callable[..., Any]) -> None:
        module.__dict__[ROUTER], module.__dict__[ROLE] = router, role
        put.append((module, module.register_forward_pre_hook(hook, with_kwargs=True)))

    for block, role in zip(streamed.of(model), roles, strict=True):
        before(block, role, _at_block)
        if role == "generate":
            merge = next(ways)
        if role in ("generate", "recover"):
            block.__dict__[MERGE] = merge
        before(block.get_submodule(streamed.norm), role, _at_norm)
        for name in streamed.attention:
            attention: Any = block.get_submodule(name)
            before(attention, role, _at_attention)
            if streamed.phases:
                for norm, hook in ((attention.norm_q, _at_query), (attention.norm_k, _at_key)):
                    norm.__dict__[ROUTER], norm.__dict__[ROLE] = router, role
                    put.append((norm, norm.register_forward_hook(hook)))
    return put


def _at_block(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Given | None:
    """In front of a block: between two grids."""
    streams = _streams(block)
    if streams is None:
        return None
    role = block.__dict__[ROLE]
    if role == "gather":
        streams.other = streams.input
    if role not in ("generate", "recover"):
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    streams.other, merge = hidden, block.__dict__[MERGE]
    if role == "generate":
        streams.input, hidden = hidden, merge.pooled(streams, hidden)
    else:
        hidden, streams.input = merge.merged(streams, hidden, streams.input), None
    if args:
        return (hidden, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": hidden}


def _at_norm(norm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Given | None:
    """In front of the norm that attention is given: both grids, where it sees two."""
    streams = _streams(norm)
    if streams is None or norm.__dict__[ROLE] not in TWO_GRIDS:
        return None
    assert streams.other is not None
    own = args[0]
    return (torch.cat([own, streams.other.to(own.dtype)], dim=1), *args[1:]), kwargs


def _at_attention(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Given | None:
    """In front of attention among picture tokens."""
    streams, role = _streams(attention), attention.__dict__[ROLE]
    if streams is None or role == "dense":
        return None
    streamed = streams.streamed
    named = dict(zip(streamed.arguments, args, strict=False)) | kwargs
    if streamed.phases:
        dense, sparse = _tables(streams, named[streamed.phases])
        # Where the grids differ, queries and keys are turned apart; a mean has no position.
        named[streamed.phases] = sparse if role == "sparse" else None
        streams.turns = (dense, sparse) if role == "recover" else (sparse, dense)
    if role == "pool":
        named["hidden_states"] = named["hidden_states"].mean(dim=1, keepdim=True)
    elif role in TWO_GRIDS:
        _check_separate(attention)
        assert streams.other is not None
        both, other = named["hidden_states"], streams.other.shape[1]
        queries, keys = both.split([both.shape[1] - other, other], dim=1)
        named |= {"hidden_states": queries, "encoder_hidden_states": keys}
    return (), named


def _at_query(norm: nn.Module, args: tuple, queries: Tensor) -> Tensor | None:
    return _turned(norm, queries, 0)


def _at_key(norm: nn.Module, args: tuple, keys: Tensor) -> Tensor | None:
    return _turned(norm, keys, 1)


def _turned(norm: nn.Module, x: Tensor, which: int) -> Tensor | None:
    """Queries or keys ``(B, n, heads, X)`` or ``(B, n, heads * X)`` at their own positions."""
    streams = _streams(norm)
    if streams is None or norm.__dict__[ROLE] not in TWO_GRIDS:
        return None
    assert streams.turns is not None
    cos, sin = streams.turns[which]
    if x.ndim == 4:
        return rotate_pairs(x, cos, sin)
    return rotate_pairs(x.unflatten(-1, (-1, cos.shape[-1])), cos, sin).flatten(-2)


def _tables(streams: Streams, dense: Phases) -> tuple[Phases, Phases]:
    """Rotary phases ``(1, N, 1, X)`` of the dense tokens, and of the sparse ones."""
    if streams.tables is None:
        cos, sin = (table[0, :, 0].float() for table in dense)
        cos, sin = pool_phases(cos, sin, streams.dense, streams.sparse)
        streams.tables = dense, (cos[None, :, None].to(dense[0]), sin[None, :, None].to(dense[0]))
    return streams.tables


def _streams(module: nn.Module) -> Streams | None:
    return module.__dict__[ROUTER].streams


def _check_separate(attention: nn.Module) -> None:
    if getattr(attention, "fused_projections", False):
        raise RuntimeError(
            "queries and keys of different tokens cannot come from one fused projection; legal in "
            "sparse modes: model.unfuse_qkv_projections()"
        )
