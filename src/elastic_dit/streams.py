"""Blocks on two token grids: what a sparse mode changes between blocks and inside them (SparseDiT).

Every stock block stays as it is. Hooks in front of some of its modules change what these are given:

- A *pooling* block's attention is given one token, the mean of all. A token that sees only itself
  has weight 1, so what it returns is what attention with equal weights would return for every
  token, at the cost of one; the block's residual sum spreads it.
- A *generate* block is given the sparse tokens. Its norm is given those and the dense ones behind
  them, which is the same since it works token by token, and its attention both parts: queries from
  the one, keys and values from the other.
- A *recover* block is given the dense tokens merged with the sparse ones; keys and values come from
  the latter.

In between, blocks simply see fewer tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elastic_dit.ops.pooling import Sides, pool_phases, rotate_pairs
from elastic_dit.routing import ROUTER, Router

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from elastic_dit.backbones.streamed import Streamed

Given = tuple[tuple, dict[str, Any]]
"""Positional and named arguments of a module."""

Phases = tuple[Tensor, Tensor]
"""Cosines and sines."""


@dataclass(frozen=True)
class Place:
    """Where a block stands: its role, the number of its sparse-dense module, and whether it is the
    first there.
    """

    role: str
    module: int = 0
    first: bool = False


@dataclass(eq=False)
class Streams:
    """State of one forward pass in a sparse mode.

    Attributes:
        dense, sparse: sides of the two grids.
        positions: position vectors ``(1, N, D)`` of the dense tokens, if they are added again.
        inputs: the dense tokens that each sparse-dense module began with.
        other: tokens of the other grid, in a block that sees two.
        tables: rotary phases of the dense tokens and of the sparse ones.
        turns: those of queries and of keys, in a block that sees two grids.
    """

    dense: Sides
    sparse: Sides
    positions: Tensor | None = None
    inputs: dict[int, Tensor] = field(default_factory=dict)
    other: Tensor | None = None
    tables: tuple[Phases, Phases] | None = None
    turns: tuple[Phases, Phases] | None = None


def attach(
    model: nn.Module, streamed: Streamed, places: Sequence[Place], router: Router
) -> list[tuple[nn.Module, RemovableHandle]]:
    """Put the hooks on; they do nothing while the router names no streams."""
    put: list[tuple[nn.Module, RemovableHandle]] = []

    def before(module: nn.Module, hook: Callable[..., Any], *settings: Any) -> None:
        module.__dict__[ROUTER] = router
        own = functools.partial(hook, *settings)  # unlike a closure's, its copies are whole
        put.append((module, module.register_forward_pre_hook(own, with_kwargs=True)))

    for block, place in zip(streamed.of(model), places, strict=True):
        attentions: list[Any] = [block.get_submodule(name) for name in streamed.attention]
        if place.role in ("generate", "recover"):
            before(block, _sparse_tokens if place.role == "generate" else _dense_tokens, place)
            before(block.get_submodule(streamed.norm), _both_grids)
        for attention in attentions:
            if place.role == "pool":
                before(attention, _mean_token, streamed)
            elif place.role in ("generate", "recover"):
                before(attention, _across_grids, streamed, place.role)
                for norm, which in ((attention.norm_q, 0), (attention.norm_k, 1)):
                    if streamed.phases:
                        norm.__dict__[ROUTER] = router
                        own = functools.partial(_turned, which)
                        put.append((norm, norm.register_forward_hook(own)))
            elif place.role == "sparse" and streamed.phases:
                before(attention, _sparse_phases, streamed)
    return put


def _sparse_tokens(
    place: Place, block: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> Given | None:
    """In front of a generate block."""
    router, streams = _present(block)
    if streams is None:
        return None
    if not place.first:
        streams.other = streams.inputs[place.module]
        return None
    dense = _hidden(args, kwargs)
    streams.inputs[place.module] = streams.other = dense
    sizes: Any = router.sizes
    return _with_hidden(args, kwargs, sizes.pooled(streams, place.module, dense))


def _dense_tokens(
    place: Place, block: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> Given | None:
    """In front of a recover block."""
    router, streams = _present(block)
    if streams is None:
        return None
    sparse = streams.other = _hidden(args, kwargs)
    dense = streams.inputs[place.module]
    if not torch.is_grad_enabled():  # else a checkpoint may need it again
        del streams.inputs[place.module]
    sizes: Any = router.sizes
    return _with_hidden(args, kwargs, sizes.merged(streams, place.module, sparse, dense))


def _both_grids(norm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Given | None:
    """In front of the norm of a block that sees two grids."""
    _, streams = _present(norm)
    if streams is None:
        return None
    assert streams.other is not None
    own = args[0]
    return (torch.cat([own, streams.other.to(own.dtype)], dim=1), *args[1:]), kwargs


def _across_grids(
    streamed: Streamed, role: str, attention: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> Given | None:
    """In front of the attention of a block that sees two grids."""
    _, streams = _present(attention)
    if streams is None:
        return None
    if getattr(attention, "fused_projections", False):
        raise RuntimeError(
            "queries and keys of different tokens cannot come from one fused projection; legal in "
            "sparse modes: model.unfuse_qkv_projections()"
        )
    named = _named(streamed, args, kwargs)
    both = named["hidden_states"]
    assert streams.other is not None
    other = streams.other.shape[1]
    queries, keys = both.split([both.shape[1] - other, other], dim=1)
    if streamed.phases:
        dense, sparse = _tables(streams, named[streamed.phases])
        streams.turns = (sparse, dense) if role == "generate" else (dense, sparse)
        named[streamed.phases] = None
    return (), named | {"hidden_states": queries, "encoder_hidden_states": keys}


def _mean_token(
    streamed: Streamed, attention: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> Given | None:
    """In front of the attention of a pooling block."""
    _, streams = _present(attention)
    if streams is None:
        return None
    named = _named(streamed, args, kwargs)
    named["hidden_states"] = named["hidden_states"].mean(dim=1, keepdim=True)
    if streamed.phases:
        named[streamed.phases] = None
    return (), named


def _sparse_phases(
    streamed: Streamed, attention: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> Given | None:
    """In front of the attention of a block on sparse tokens, where it turns them."""
    _, streams = _present(attention)
    if streams is None:
        return None
    assert streamed.phases is not None
    named = _named(streamed, args, kwargs)
    named[streamed.phases] = _tables(streams, named[streamed.phases])[1]
    return (), named


def _turned(which: int, norm: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    """Behind the norm of queries (0) or keys (1) in a block that sees two grids."""
    _, streams = _present(norm)
    if streams is None:
        return None
    assert streams.turns is not None
    cos, sin = streams.turns[which]
    if output.ndim == 4:
        return rotate_pairs(output, cos, sin)
    return rotate_pairs(output.unflatten(-1, (-1, cos.shape[-1])), cos, sin).flatten(-2)


def _tables(streams: Streams, dense: Phases) -> tuple[Phases, Phases]:
    """Rotary phases ``(1, N, 1, X)`` of the dense tokens, and of the sparse ones."""
    if streams.tables is None:
        cos, sin = (table[0, :, 0].float() for table in dense)
        sparse = pool_phases(cos, sin, streams.dense, streams.sparse)
        cos, sin = (table[None, :, None].to(dense[0]) for table in sparse)
        streams.tables = dense, (cos, sin)
    return streams.tables


def _present(module: nn.Module) -> tuple[Router, Streams | None]:
    router: Router = module.__dict__[ROUTER]
    return router, router.streams


def _named(streamed: Streamed, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(streamed.arguments, args, strict=False)) | kwargs


def _hidden(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _with_hidden(args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> Given:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": hidden}
