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

Where picture and text attend together, text tokens are among the queries and among the keys of both
kinds, and their own stream stays as it is; such attention takes queries, keys and values from one
tensor, so that its layers of keys and values are given theirs apart. There is no pool block then.

In between, blocks simply see fewer tokens. All blocks get the same hooks, which read the role from
the module: torch's compiler reuses the graph of one block for others without a look at their hooks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ditdial.backbones.routed import has_fused
from ditdial.backbones.streamed import Streamed
from ditdial.layers.new_modules import Hook
from ditdial.layers.token_grids import Phases, TokenGrids
from ditdial.layers.wiring import wiring_of
from ditdial.ops.pooling import pool_phases, rotate_pairs

Given = tuple[tuple, dict[str, Any]]
"""Positional and named arguments of a module."""

ROLE = "_ditdial_role"
"""Attribute of a hooked module: what its block does with the two grids."""

MERGE = "_ditdial_merge"
"""Attribute of a block that changes grids: what merges them."""

TWO_GRIDS = ("generate", "gather", "recover")


def grid_hooks(
    model: nn.Module,
    streamed: Streamed,
    roles: Sequence[str],
    merges: Iterable[nn.Module],
) -> Iterator[Hook]:
    """The hooks; they do nothing while the pass has one grid.

    Args:
        roles: of the blocks.
        merges: of the sparse-dense modules; each has ``pooled`` and ``merged``.
    """
    ways = iter(merges)
    merge: nn.Module | None = None
    for block, role in zip(streamed.of(model), roles, strict=True):
        own = {ROLE: role}
        if role == "generate":
            merge = next(ways)  # the same for all blocks of a sparse-dense module
        merging = {MERGE: merge} if role in ("generate", "recover") else {}
        yield Hook(block, _at_block, attributes=own | merging)
        yield Hook(streamed.norm_of(block), _at_norm, attributes=own)
        if streamed.parallel in block._modules:
            layer = block.get_submodule(streamed.parallel)
            yield Hook(layer, _beside_attention, attributes=own, follows=True)
        for attention, _ in streamed.attention_of(block):
            yield Hook(attention, _at_attention, attributes=own)
            for layer in (attention.to_k, attention.to_v) if streamed.joint else ():
                yield Hook(layer, _at_keys, attributes=own, follows=True)
            for name, run in _BEHIND.items() if streamed.phases else ():
                norm = getattr(attention, name, None)
                if norm is not None:
                    yield Hook(norm, run, behind=True, attributes=own)


def own_tokens(norm: nn.Module, both: Tensor) -> Tensor:
    """The picture tokens of a block, of those that a norm of it is given in a sparse mode."""
    if ROLE not in norm.__dict__:  # not the norm that attention is given
        return both
    grids, role = _present(norm)
    return both if grids is None or role not in TWO_GRIDS else both[:, : grids.own]


def _at_block(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Given | None:
    """In front of a block: between two grids."""
    grids, role = _present(block)
    if grids is None or role not in TWO_GRIDS:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    if role == "gather":
        grids.own, grids.other = hidden.shape[1], grids.input
        return None
    grids.other, merge = hidden, block.__dict__[MERGE]
    if role == "generate":
        grids.input, hidden = hidden, merge.pooled(grids, hidden)
    else:
        hidden, grids.input = merge.merged(grids, hidden, grids.input), None
    grids.own = hidden.shape[1]
    if args:
        return (hidden, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": hidden}


def _at_norm(norm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Given | None:
    """In front of the norm that attention is given: both grids, where it sees two."""
    grids, role = _present(norm)
    if grids is None or role not in TWO_GRIDS:
        return None
    assert grids.other is not None
    own = args[0]
    return (torch.cat([own, grids.other.to(own.dtype)], dim=1), *args[1:]), kwargs


def _beside_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Given | None:
    """In front of what is given the same as attention: a block's own tokens alone."""
    grids, role = _present(module)
    if grids is None or role not in TWO_GRIDS:
        return None
    assert grids.other is not None
    both = args[0]
    return (both[:, : both.shape[1] - grids.other.shape[1]], *args[1:]), kwargs


def _at_attention(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Given | None:
    """In front of attention among picture tokens."""
    grids, role = _present(attention)
    if grids is None or role == "dense":
        return None
    streamed = grids.streamed
    named = dict(zip(streamed.arguments, args, strict=False)) | kwargs
    if streamed.phases:
        given = named[streamed.phases]
        text, dense, sparse = _tables(grids, given)
        # Where the grids differ, queries and keys are turned apart; a mean has no position.
        named[streamed.phases] = _joined(text, sparse, given[0]) if role == "sparse" else None
        grids.turns = (dense, sparse) if role == "recover" else (sparse, dense)
    if role == "pool":
        named["hidden_states"] = named["hidden_states"].mean(dim=1, keepdim=True)
    elif role in TWO_GRIDS:
        _check_separate(attention, streamed)
        queries, keys = _apart(grids, named["hidden_states"])
        named["hidden_states"] = queries
        if streamed.joint:
            grids.keys = keys
        else:
            named["encoder_hidden_states"] = keys
    return (), named


def _apart(grids: TokenGrids, both: Tensor) -> tuple[Tensor, Tensor]:
    """What queries and what keys are made from; text tokens, which come first, are in both."""
    assert grids.other is not None
    own = both.shape[1] - grids.other.shape[1]
    queries, keys = both.split([own, both.shape[1] - own], dim=1)
    if own > grids.own:
        keys = torch.cat([both[:, : own - grids.own], keys], dim=1)
    return queries, keys


def _at_keys(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Given | None:
    """In front of the layers of keys and values, where attention is joint."""
    grids, role = _present(layer)
    if grids is None or role not in TWO_GRIDS:
        return None
    return (grids.keys,), kwargs


def _behind_queries(norm: nn.Module, args: tuple, queries: Tensor) -> Tensor | None:
    return _turned(norm, queries, 0)


def _behind_keys(norm: nn.Module, args: tuple, keys: Tensor) -> Tensor | None:
    return _turned(norm, keys, 1)


def _behind_text(norm: nn.Module, args: tuple, x: Tensor) -> Tensor | None:
    grids, role = _present(norm)
    if grids is None or role not in TWO_GRIDS:
        return None
    assert grids.tables is not None
    return rotate_pairs(x, *(table[:, None] for table in grids.tables[0]))


_BEHIND = {
    "norm_q": _behind_queries,
    "norm_k": _behind_keys,
    "norm_added_q": _behind_text,
    "norm_added_k": _behind_text,
}
"""Hooks behind the norms of attention whose queries and keys are turned."""


def _turned(norm: nn.Module, x: Tensor, which: int) -> Tensor | None:
    """Queries or keys ``(B, n, heads, X)`` or ``(B, n, heads * X)`` at their own positions."""
    grids, role = _present(norm)
    if grids is None or role not in TWO_GRIDS:
        return None
    assert grids.turns is not None
    assert grids.tables is not None
    phases = grids.turns[which]
    if x.shape[1] > len(phases[0]):
        phases = _joined(grids.tables[0], phases, phases[0])
    cos, sin = (table[:, None] for table in phases)
    if x.ndim == 4:
        return rotate_pairs(x, cos, sin)
    return rotate_pairs(x.unflatten(-1, (-1, cos.shape[-1])), cos, sin).flatten(-2)


def _tables(grids: TokenGrids, given: Phases) -> tuple[Phases, Phases, Phases]:
    """Rotary phases ``(n, X)`` of the text, of the dense tokens and of the sparse ones.

    Args:
        given: those of text and dense tokens, as ``(n, X)`` or ``(1, n, 1, X)``.
    """
    if grids.tables is None:
        cos, sin = (table.flatten(0, -2).float() for table in given)
        text = len(cos) - math.prod(grids.dense) if grids.streamed.joint else 0
        dense = cos[text:], sin[text:]
        sparse = pool_phases(*dense, grids.dense, grids.sparse)
        grids.tables = (cos[:text], sin[:text]), dense, sparse
    return grids.tables


def _joined(text: Phases, picture: Phases, like: Tensor) -> Phases:
    """Phases of both, in the form and dtype of others."""
    cos, sin = (torch.cat(pair).to(like) for pair in zip(text, picture, strict=True))
    return (cos, sin) if like.ndim == 2 else (cos[None, :, None], sin[None, :, None])


def _present(module: nn.Module) -> tuple[TokenGrids | None, str]:
    return wiring_of(module).state.grids, module.__dict__[ROLE]


def _check_separate(attention: Any, streamed: Streamed) -> None:
    if has_fused(attention):
        raise RuntimeError(
            "queries and keys of different tokens cannot come from one fused projection; legal in "
            "sparse modes: model.unfuse_qkv_projections()"
        )
    if streamed.joint and not all(ROLE in x.__dict__ for x in (attention.to_k, attention.to_v)):
        raise RuntimeError(
            "layers of keys and values were put in others (as a LoRA does) since the model was "
            "last called by itself, and would be given the wrong tokens; legal in sparse modes of "
            "joint attention inside a larger graph: call the model once by itself before"
        )
