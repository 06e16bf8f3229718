"""How a live model's submodules learn the present mode: in-place class swap and one shared router.

A module's class is replaced by a generated subclass (same object, same weights, same keys, as FSDP2
does). Its ``forward`` looks at the router and either calls the stock ``forward`` or takes the
coarse way. No stock ``forward`` is copied.

Packing. Two branches in different modes can share one call. Their tokens are laid out as rows of
length one, ``(all tokens, 1, D)``: norms, modulation and feed-forward work per row and need no
change; only modulation (one vector per picture, repeated for its tokens) and attention (pictures
regrouped under a block-diagonal mask) know about the layout.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_dit.mode import FULL, Mode

if TYPE_CHECKING:
    from elastic_dit.backbones.base import Backbone
    from elastic_dit.methods.base import Sizes

ROUTER = "_elastic_router"


@dataclass(frozen=True)
class Part:
    """Rows of a packed batch that share a mode: ``rows`` pictures of ``tokens`` tokens each."""

    mode: Mode
    rows: int
    tokens: int

    @property
    def length(self) -> int:
        """Tokens of all pictures of the part."""
        return self.rows * self.tokens


@dataclass(eq=False)
class Router:
    """What a model's swapped submodules read: plain state, set outside any compiled region.

    Attributes:
        embed: the module that makes tokens.
        mode: of the present forward pass, when all rows share one.
        layout: the parts of a packed batch, else None.
        joined: inside attention, packed tokens are regrouped by picture.
        grid: base grid ``(height, width)`` of the present call.
        low_rank: rank of the updates of self-attention and feed-forward; 0 for none.
        merged: use weights with the low-rank update added in (one more copy per mode) instead of
            unmerged updates.
    """

    backbone: Backbone
    sizes: Sizes
    embed: nn.Module
    mode: Mode = FULL
    layout: tuple[Part, ...] | None = None
    joined: bool = False
    grid: tuple[int, int] = (0, 0)
    merged: bool = False
    low_rank: int = 0
    tables: dict[Any, Tensor] = field(default_factory=dict)

    def tokens(self, mode: Mode) -> int:
        """Tokens of one picture of the present grid."""
        _, kh, kw = mode.patch_scale
        return -(-self.grid[0] // kh) * -(-self.grid[1] // kw)

    def pack(self, pieces: list[Tensor]) -> Tensor:
        """``(rows, tokens, D)`` per part -> ``(all tokens, 1, D)``."""
        return torch.cat([piece.flatten(0, 1) for piece in pieces])[:, None]

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """The inverse of `pack`."""
        assert self.layout is not None
        pieces = packed[:, 0].split([part.length for part in self.layout])
        return [
            piece.unflatten(0, (part.rows, part.tokens))
            for piece, part in zip(pieces, self.layout, strict=True)
        ]


class EmbedSeam(nn.Module):
    """Mixed into the module that makes tokens (and adds positions)."""

    def forward(self, latent: Tensor) -> Tensor:
        """Base tokens in full mode; grouped tokens at the centres of their groups otherwise."""
        router: Router = self.__dict__[ROUTER]
        router.grid = router.backbone.grid(self, latent)
        if router.layout is None:
            return self._tokens(router, latent, router.mode)
        pieces = latent.split([part.rows for part in router.layout])
        return router.pack(
            [
                self._tokens(router, x, part.mode)
                for x, part in zip(pieces, router.layout, strict=True)
            ]
        )

    def _tokens(self, router: Router, latent: Tensor, mode: Mode) -> Tensor:
        if not router.sizes.routes(mode):
            return super().forward(latent)  # pyrefly: ignore[missing-attribute]
        vectors = router.backbone.patch_vectors(self, latent)
        tokens = router.sizes.embed(vectors, mode)
        positions = router.backbone.positions(self, router, mode)
        return (tokens + positions).to(tokens.dtype)


class OutputSeam(nn.Module):
    """Mixed into the last linear layer: tokens of any mode become base tokens in base order."""

    def forward(self, hidden: Tensor) -> Tensor:
        """``(B, n, D)`` of the present mode -> ``(B, N, c)`` on the base grid."""
        router: Router = self.__dict__[ROUTER]
        if router.layout is None:
            return self._vectors(router, hidden, router.mode)
        pieces = router.unpack(hidden)
        return torch.cat(
            [
                self._vectors(router, x, part.mode)
                for x, part in zip(pieces, router.layout, strict=True)
            ]
        )

    def _vectors(self, router: Router, hidden: Tensor, mode: Mode) -> Tensor:
        if not router.sizes.routes(mode):
            return super().forward(hidden)  # pyrefly: ignore[missing-attribute]
        return router.sizes.project(hidden, mode, router.grid)


class ModulationSeam(nn.Module):
    """Mixed into a linear layer that modulates all tokens of a picture: repeats its output."""

    def forward(self, conditioning: Tensor) -> Tensor:
        """``(pictures, D)`` -> ``(pictures, X)``, or one row per packed token."""
        modulation = super().forward(conditioning)  # pyrefly: ignore[missing-attribute]
        layout = self.__dict__[ROUTER].layout
        if layout is None:
            return modulation
        pieces = modulation.split([part.rows for part in layout])
        return torch.cat(
            [
                x.repeat_interleave(part.tokens, dim=0)
                for x, part in zip(pieces, layout, strict=True)
            ]
        )


class AttentionSeam(nn.Module):
    """Mixed into self-attention: regroups packed tokens by picture, block-diagonally masked."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stock attention unless the batch is packed.

        Raises:
            RuntimeError: query, key and value are fused, but adapted one by one.
        """
        router: Router = self.__dict__[ROUTER]
        coarse = router.layout is not None or not router.mode.is_full
        if coarse and router.low_rank and getattr(self, "fused_projections", False):
            raise RuntimeError(
                "fused query, key and value projections have no low-rank updates; call "
                "unfuse_qkv_projections() before using a coarse mode"
            )
        stock = super().forward  # pyrefly: ignore[missing-attribute]
        if router.layout is None:
            return stock(hidden_states, *args, **kwargs)
        rows = router.layout[0].rows
        lengths = [part.tokens for part in router.layout]
        joined = torch.cat(router.unpack(hidden_states), dim=1)
        mask = torch.block_diag(
            *[torch.ones(n, n, dtype=torch.bool, device=joined.device) for n in lengths]
        )
        router.joined = True
        try:
            out = stock(hidden_states=joined, attention_mask=mask.expand(rows, -1, -1))
        finally:
            router.joined = False
        return router.pack(list(out.split(lengths, dim=1)))


class LowRankSeam(nn.Module):
    """Mixed into a `torch.nn.Linear`: adds ``B A x`` of a coarse mode, nothing in full mode.

    The pairs are ``coarse_A[mode]`` of shape ``(rank, in)`` and ``coarse_B[mode]`` of shape ``(out,
    rank)``.
    """

    weight: Tensor
    bias: Tensor | None
    coarse_A: nn.ParameterDict
    coarse_B: nn.ParameterDict

    def forward(self, x: Tensor) -> Tensor:
        """Stock linear layer plus the update of each token's mode."""
        router: Router = self.__dict__[ROUTER]
        layout = router.layout
        if layout is None:
            return self._at(router, x, router.mode)
        modes = [part.mode for part in layout]
        if router.joined:  # (pictures, tokens of all parts, D)
            return self._spread(router, x, modes, [part.tokens for part in layout], dim=1)
        return self._spread(router, x, modes, [part.length for part in layout], dim=0)

    def _at(self, router: Router, x: Tensor, mode: Mode) -> Tensor:
        if mode is FULL or mode.name not in self.coarse_A:  # the first is quicker to see
            return super().forward(x)  # pyrefly: ignore[missing-attribute]
        if self._may_merge(router):
            return F.linear(x, self._merged(mode), self.bias)
        return super().forward(x) + self._update(x, mode)  # pyrefly: ignore[missing-attribute]

    def _spread(
        self, router: Router, x: Tensor, modes: list[Mode], sizes: list[int], dim: int
    ) -> Tensor:
        pieces = x.split(sizes, dim=dim)
        if self._may_merge(router):
            return torch.cat(
                [self._at(router, p, m) for p, m in zip(pieces, modes, strict=True)], dim=dim
            )
        base = super().forward(x)  # pyrefly: ignore[missing-attribute]
        updated = [
            y + self._update(p, m) if m.name in self.coarse_A else y
            for p, m, y in zip(pieces, modes, base.split(sizes, dim=dim), strict=True)
        ]
        return torch.cat(updated, dim=dim)

    def _may_merge(self, router: Router) -> bool:
        # Another class computes more than its weight says (a user's LoRA, quantisation).
        plain = type(self).__bases__[1] is nn.Linear
        return router.merged and plain and not torch.is_grad_enabled()

    def _update(self, x: Tensor, mode: Mode) -> Tensor:
        return F.linear(F.linear(x, self.coarse_A[mode.name]), self.coarse_B[mode.name])

    def _merged(self, mode: Mode) -> Tensor:
        A, B = self.coarse_A[mode.name], self.coarse_B[mode.name]
        # In-place changes of any of the three (a user's fused LoRA, a training step) make the copy
        # stale.
        version = versions(self.weight, A, B)
        cache = self.__dict__.setdefault("_elastic_merged", {})
        if cache.get(mode, (None,))[0] != version:
            cache[mode] = (version, torch.addmm(self.weight, B, A).detach())
        return cache[mode][1]


def versions(*tensors: Tensor) -> tuple[object, ...]:
    """What changes when any of the tensors is replaced, moved, cast or written to."""
    return tuple([(x.data_ptr(), x.dtype, 0 if x.is_inference() else x._version) for x in tensors])


@contextlib.contextmanager
def remembered_in_checkpoints(model: nn.Module, router: Router) -> Iterator[None]:
    """Let gradient checkpointing recompute each block in the mode it first ran in.

    Recomputation happens in the backward pass, when the router may long be in another mode.
    """
    if not torch.is_grad_enabled():
        yield  # the search below costs 1 % of a small model's forward pass
        return
    name = "_gradient_checkpointing_func"
    owners = [m for m in model.modules() if m.__dict__.get(name) is not None]
    originals = [owner.__dict__[name] for owner in owners]

    def remembering(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            then = (router.mode, router.layout, router.joined, router.grid)

            def again(*inner: Any, **named: Any) -> Any:
                now = (router.mode, router.layout, router.joined, router.grid)
                router.mode, router.layout, router.joined, router.grid = then
                try:
                    return function(*inner, **named)
                finally:
                    router.mode, router.layout, router.joined, router.grid = now

            return checkpoint(again, *args, **kwargs)

        return run

    for owner, original in zip(owners, originals, strict=True):
        owner.__dict__[name] = remembering(original)
    try:
        yield
    finally:
        for owner, original in zip(owners, originals, strict=True):
            owner.__dict__[name] = original


@functools.cache
def _generated(base: type, mixin: type) -> type:
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {"__module__": __name__})


def swap_class(module: nn.Module, mixin: type, router: Router) -> None:
    """Put ``mixin`` in front of the class of ``module``; `restore_class` undoes it."""
    module.__class__ = _generated(type(module), mixin)
    module.__dict__[ROUTER] = router
    rebind_hooks(module)


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class` exactly."""
    module.__class__ = type(module).__bases__[1]
    for key in (ROUTER, "_elastic_merged"):
        module.__dict__.pop(key, None)
    rebind_hooks(module)


def rebind_hooks(module: nn.Module) -> None:
    """Let hooks that were installed earlier call the module's present class.

    accelerate and diffusers both keep the bound ``forward`` they replaced; without this the swap
    would be a silent no-op.
    """
    forward = types.MethodType(type(module).forward, module)

    def is_stock(function: object) -> bool:  # not the wrapper of another hook
        return isinstance(function, types.MethodType) and function.__self__ is module

    if is_stock(module.__dict__.get("_old_forward")):  # accelerate
        module.__dict__["_old_forward"] = forward
    registry = module.__dict__.get("_diffusers_hook")
    for reference in registry._fn_refs if registry is not None else ():  # diffusers
        if is_stock(reference.original_forward):
            reference.original_forward = forward
        if is_stock(reference.forward):
            reference.forward = forward
