"""What the routed submodules do: linear layers without the closed heads and channels, attention of
fewer heads, feed-forward of fewer tokens.

They are mixed in front of `ditdial.layers.low_rank.LowRankSeam`, where a layer has both: updates
narrow with their layer, and tokens that skip the one skip the other.

A stock block calls them as always. Attention processors and activations work on whatever width they
are given, so that slicing the layers before and after them is enough.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditdial.host.weights import versions
from ditdial.layers.grid_hooks import own_tokens
from ditdial.layers.low_rank import LowRankSeam
from ditdial.layers.width_pass import Narrow, Open, Routing, per_row
from ditdial.layers.wiring import wiring_of

PLACE = "_ditdial_place"
"""Attribute of a routed module: where it stands."""

SLICES = "_ditdial_slices"
"""Attribute of a routed layer: its weights without closed features."""


@dataclass(frozen=True)
class Place:
    """Where a module stands among the routed ones.

    Attributes:
        block: number of its block.
        role: whether heads or channels are its features, or both, one after the other.
        features: how many.
        name: of a linear layer, in the model.
        early: channels are gated before their activation, which is zero at zero; else behind the
            product of two halves, where both ways have the same gradient.
    """

    block: int
    role: str = "heads"
    features: int = 0
    name: str = ""
    early: bool = False


def _narrow(module: nn.Module) -> Narrow | None:
    return wiring_of(module).state.narrow


def _open(module: nn.Module) -> tuple[Narrow, Open] | None:
    narrow = _narrow(module)
    if narrow is None:
        return None
    place = _place(module)
    return narrow, narrow.opens[place.role][place.block]


class RowsSeam(nn.Module):
    """Mixed into a `torch.nn.Linear` with a row for each head's feature or each channel."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` -> the features that are left in, ``(..., F')``."""
        found = _open(self)
        if found is None:
            return super().forward(x)  # pyrefly: ignore[missing-attribute]
        narrow, part = found
        if part.gates is not None:
            y = super().forward(x) + _update(self, narrow, x)  # pyrefly: ignore[missing-attribute]
            return _gated(y, part.gates) if _place(self).early else y
        if narrow.mix is None and part.features is None:
            return super().forward(x)  # pyrefly: ignore[missing-attribute]
        return _through_slices(self, x, narrow, part, dim=0)


class ColumnsSeam(nn.Module):
    """Mixed into a `torch.nn.Linear` with a column for each of them."""

    def forward(self, x: Tensor) -> Tensor:
        """The features that are left in, ``(..., F')`` -> ``(..., D)``."""
        found = _open(self)
        if found is None:
            return super().forward(x)  # pyrefly: ignore[missing-attribute]
        narrow, part = found
        if part.gates is not None:
            gates = _late_gates(_place(self), narrow, part.gates)
            x = x if gates is None else _gated(x, gates)
            y = super().forward(x)  # pyrefly: ignore[missing-attribute]
            return y if narrow.mix is None else y + _update(self, narrow, x)
        if narrow.mix is None and part.features is None:
            return super().forward(x)  # pyrefly: ignore[missing-attribute]
        return _through_slices(self, x, narrow, part, dim=1)


def _place(module: nn.Module) -> Place:
    return module.__dict__[PLACE]


def _gated(x: Tensor, gates: Tensor) -> Tensor:
    """Features ``(B, ..., F)`` times the gates of each picture."""
    gates = per_row(gates, x.shape[0]).to(x.dtype)
    return x * gates.view(len(gates), *[1] * (x.ndim - 2), -1)


def _late_gates(place: Place, narrow: Narrow, gates: Tensor) -> Tensor | None:
    """Those that have not been applied before a layer's columns are multiplied; None for none.

    The straight-through gradient of a gate is that of the place where it multiplies. DyDiT gates
    what enters the activation (2410.03456, section 3.2), so what leaves it is gated no more.
    """
    if not place.early:
        return gates
    if place.role == "channels":
        return None
    heads = narrow.opens["heads"][place.block].gates
    assert heads is not None
    return F.pad(heads, (0, place.features), value=1.0)


def _through_slices(module: Any, x: Tensor, narrow: Narrow, part: Open, *, dim: int) -> Tensor:
    """A layer without the closed features, with the low-rank updates of the present mode."""
    mode = wiring_of(module).state.mode
    updated = isinstance(module, LowRankSeam) and bool(module.coarse_parts(mode))
    merged = module.coarse_merged(mode) if updated else None
    y = F.linear(x, *_sliced(module, merged, narrow, part, dim=dim))
    if not updated or merged is not None:
        return y
    if part.features is None:
        return y + module.coarse_update(x, mode)
    if dim == 1:
        return y + module.coarse_update(x, mode, columns=part.features)
    return y + module.coarse_update(x, mode, rows=_rows(module, part.features))


def _sliced(
    module: Any, merged: tuple[object, Tensor] | None, narrow: Narrow, part: Open, *, dim: int
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias without the closed features; kept for the next call with the same ones.

    Args:
        merged: the weight with low-rank updates in it, behind its version, instead of its own.
    """
    weight = module.weight if merged is None else merged[1]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _cut(module, weight, narrow, part, dim=dim)
    used = (module.weight, module.bias, *(() if narrow.mix is None else _experts(module)))
    version = merged and merged[0], versions(*(x for x in used if x is not None))
    slices: list[tuple[Any, ...]] = module.__dict__.setdefault(SLICES, [])
    for known in slices:
        if known[0] is part.features and known[1] is narrow.mix and known[2] == version:
            return known[3]
    made = _cut(module, weight, narrow, part, dim=dim)
    slices.append((part.features, narrow.mix, version, made))
    del slices[: max(0, len(slices) - narrow.slices)]
    return made


def _cut(
    module: Any, weight: Tensor, narrow: Narrow, part: Open, *, dim: int
) -> tuple[Tensor, Tensor | None]:
    bias, index = module.bias, part.features
    if narrow.mix is not None:
        A, B = _experts(module)
        mixed = torch.einsum("e,eor->or", narrow.mix[0].to(B.dtype), B)
        weight = weight + (mixed @ A).to(weight.dtype)
    if index is None:
        return weight, bias
    if dim == 1:
        return weight[:, index], bias
    index = _rows(module, index)
    return weight[index], bias if bias is None else bias[index]


def _rows(module: Any, features: Tensor) -> Tensor:
    """Rows of the weight of some features."""
    half = module.__dict__[PLACE].features
    if half < module.out_features:  # a second half gates the first
        return torch.cat([features, features + half])
    return features


def _experts(module: Any) -> tuple[Tensor, Tensor]:
    routing: Routing | None = wiring_of(module).new.routing
    assert routing is not None
    return routing.experts(module.__dict__[PLACE].name)


def _update(module: Any, narrow: Narrow, x: Tensor) -> Tensor | float:
    """The low-rank update of each picture: ``sum_e mix_e B_e A x``."""
    if narrow.mix is None:
        return 0.0
    A, B = _experts(module)
    mix = per_row(narrow.mix, x.shape[0]).to(x.dtype)
    inner = F.linear(x, A.to(x.dtype))
    merged = torch.einsum("be,eor->bor", mix, B.to(x.dtype)).expand(x.shape[0], -1, -1)
    return torch.einsum("b...r,bor->b...o", inner, merged)


class HeadsSeam(nn.Module):
    """Mixed into attention, whose processor asks it for the number of heads."""

    @property
    def heads(self) -> int:
        """Heads of the present forward pass."""
        found = _open(self)
        stock: int = self.__dict__["heads"]
        return stock if found is None or found[1].heads is None else found[1].heads

    @heads.setter
    def heads(self, heads: int) -> None:
        self.__dict__["heads"] = heads


class HeadsNormSeam(nn.Module):
    """Mixed into a root-mean-square norm over the features of all heads: of those left in."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., F')`` -> ``(..., F')``."""
        found = _open(self)
        part = found and found[1]
        module: Any = self
        if part and part.features is not None:
            return F.rms_norm(x, (x.shape[-1],), module.weight[part.features], module.eps)
        if not part or part.gates is None:
            return super().forward(x)  # pyrefly: ignore[missing-attribute]
        gates = per_row(part.gates, x.shape[0]).view(-1, *[1] * (x.ndim - 2), x.shape[-1])
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        squares = (x.float().square() * gates).sum(-1, keepdim=True) / gates.sum(-1, keepdim=True)
        return (x.float() * torch.rsqrt(squares + eps)).to(x.dtype) * module.weight


class ResidualSeam(nn.Module):
    """Mixed into the norm before a feed-forward: shows the router the stream of tokens."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the stock norm returns."""
        narrow, place = _narrow(self), self.__dict__[PLACE]
        if narrow is not None and narrow.token_logits is not None:
            picture = x[:, narrow.text :] if place.role == "both" else x
            picture = own_tokens(self, picture)
            narrow.logits[place.block] = narrow.token_logits(place.block, picture)
        return super().forward(x, *args, **kwargs)  # pyrefly: ignore[missing-attribute]


def _of_entering(stock: Callable[..., Tensor], x_BND: Tensor, kept: Tensor, *args: Any) -> Tensor:
    """What a layer that looks at each token alone makes of some, and zero for the others.

    Args:
        kept: places of those that enter, in all rows laid end to end.
    """
    y = stock(x_BND.flatten(0, 1)[kept][None], *args)[0]
    zeros = y.new_zeros(x_BND.shape[0] * x_BND.shape[1], y.shape[-1])
    return zeros.index_copy_(0, kept, y).unflatten(0, x_BND.shape[:2])


class SkipRowsSeam(nn.Module):
    """Mixed into a linear layer that picture tokens may skip, in one sequence with the text.

    The layers of a block that do so come one after the other, and skipped tokens are zero to both,
    so that only the residual of the block is left to them.
    """

    def forward(self, x_BND: Tensor) -> Tensor:
        """``(B, T + N, D)`` -> ``(B, T + N, D')``, zero for skipped tokens."""
        narrow, place = _narrow(self), self.__dict__[PLACE]
        stock = super().forward  # pyrefly: ignore[missing-attribute]
        if narrow is None or place.block not in narrow.logits:
            return stock(x_BND)
        if narrow.token_gates is None:
            return _of_entering(stock, x_BND, narrow.entering_with_text(place.block, x_BND.shape))
        if place.role != "both":  # only the output of the block's last layer counts
            return stock(x_BND)
        gates = F.pad(narrow.gates(place.block), (narrow.text, 0), value=1.0)
        return stock(x_BND) * gates[..., None].to(x_BND.dtype)


class SkipSeam(nn.Module):
    """Mixed into a feed-forward that tokens may skip; a skipped token gets nothing from it."""

    def forward(self, x_BND: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``(B, N, D)`` -> ``(B, N, D)``, zero for skipped tokens."""
        narrow, block = _narrow(self), self.__dict__[PLACE].block
        stock = super().forward  # pyrefly: ignore[missing-attribute]
        if narrow is None or block not in narrow.logits:
            return stock(x_BND, *args, **kwargs)
        if narrow.token_gates is not None:
            gates = narrow.gates(block)
            return stock(x_BND, *args, **kwargs) * gates[..., None].to(x_BND.dtype)
        entering = narrow.entering(block)
        if len(entering) == x_BND.shape[0] * x_BND.shape[1]:
            return stock(x_BND, *args, **kwargs)
        return _of_entering(functools.partial(stock, **kwargs), x_BND, entering, *args)
