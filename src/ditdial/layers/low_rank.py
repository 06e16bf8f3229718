"""Low-rank updates of coarse modes in linear layers, apart from the weight or merged into it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditdial.host.pickling import MADE_OF
from ditdial.host.weights import is_summable, versions
from ditdial.layers.packing import Layout
from ditdial.layers.state import MERGED, PARTS, ROUTER, Router
from ditdial.plan.mode import FULL, Mode


class LowRankSeam(nn.Module):
    """Mixed into a `torch.nn.Linear`: adds ``B A x`` of a coarse mode, nothing in full mode.

    The pairs are ``coarse_A[part]`` of shape ``(rank, in)`` and ``coarse_B[part]`` of shape ``(out,
    rank)``, by what modes are made of: ``patch2_grid4`` has those of ``patch2`` and of ``grid4``.
    The layer may be one of PEFT, which has a ``merge`` and a ``merged`` of its own.
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
        if router.joined is None:
            return self._spread(router, layout, x, x.split(layout.strips), dim=0)
        joined, pieces = router.joined  # (pictures, tokens of all parts, D)
        if x is not joined:
            pieces = x.split(layout.tokens, dim=1)
        return self._spread(router, layout, x, pieces, dim=1)

    def _at(self, router: Router, x: Tensor, mode: Mode) -> Tensor:
        merged = None if mode is FULL else self.coarse_merged(mode)
        if merged is not None:
            return F.linear(x, merged[1], self.bias)
        if mode is FULL or not self.coarse_parts(mode):
            return super().forward(x)  # pyrefly: ignore[missing-attribute]
        return super().forward(x) + self.coarse_update(x, mode)  # pyrefly: ignore[missing-attribute]

    def _spread(
        self, router: Router, layout: Layout, x: Tensor, pieces: Sequence[Tensor], dim: int
    ) -> Tensor:
        """Each part in its own mode; ``x`` is the parts joined along ``dim``."""
        if any(self.coarse_merged(mode) is not None for mode in layout.modes):
            casts = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
            if dim == 0 and not casts:
                return self._written(layout, x)
            # Of what is not contiguous torch would make a product, and a sum for the bias.
            each = zip(pieces, layout.modes, strict=True)
            return torch.cat([self._at(router, x.contiguous(), m) for x, m in each], dim=dim)
        base = super().forward(x)  # pyrefly: ignore[missing-attribute]
        parts = base.split([piece.shape[dim] for piece in pieces], dim=dim)
        updates = [
            self.coarse_update(piece, mode) if self.coarse_parts(mode) else None
            for piece, mode in zip(pieces, layout.modes, strict=True)
        ]
        each = zip(parts, updates, strict=True)
        if torch.is_grad_enabled():  # autograd does not let parts be written to
            return torch.cat([y if own is None else y + own for y, own in each], dim=dim)
        for y, own in each:
            if own is not None:
                y.add_(own)
        return base

    def _written(self, layout: Layout, x: Tensor) -> Tensor:
        """Tokens of each part times the weight of its mode, with no copy of what comes out."""
        tokens = x.flatten(0, -2)
        out = tokens.new_empty(len(tokens), self.weight.shape[0])
        pieces = tokens.split(layout.lengths), out.split(layout.lengths)
        for mode, piece, own in zip(layout.modes, *pieces, strict=True):
            merged = self.coarse_merged(mode)
            weight = self.weight if merged is None else merged[1]
            if self.bias is None:
                torch.mm(piece, weight.T, out=own)
            else:
                torch.addmm(self.bias, piece, weight.T, out=own)
        return out.view(*x.shape[:-1], -1)

    def coarse_parts(self, mode: Mode) -> list[str]:
        """Keys of a mode's pairs."""
        held = self.coarse_A._parameters  # torch's own look-up takes longer than all the rest
        return [part for part in mode.parts if part in held]

    def coarse_merged(self, mode: Mode) -> tuple[object, Tensor] | None:
        """The weight with a mode's updates added in, where that is in use, behind its version."""
        if not self.__dict__[ROUTER].merging:
            return None
        return self.__dict__.get(MERGED, {}).get(mode.name)

    def coarse_update(
        self, x: Tensor, mode: Mode, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> Tensor:
        """What a mode's updates add, ``(..., in) -> (..., out)``.

        Args:
            rows, columns: of the weight, where others are left out.
        """
        pairs = [(self.coarse_A[part], self.coarse_B[part]) for part in self.coarse_parts(mode)]
        if columns is not None:
            pairs = [(A[:, columns], B) for A, B in pairs]
        if rows is not None:
            pairs = [(A, B[rows]) for A, B in pairs]
        return functools.reduce(torch.add, [F.linear(F.linear(x, A), B) for A, B in pairs])

    def coarse_places(self, mode: Mode) -> list[tuple[dict[str, Any], str]]:
        """Where that is held which a mode's merged weight is made of: weight, then A and B.

        Nothing for a mode without updates here.
        """
        A, B = self.coarse_A._parameters, self.coarse_B._parameters
        pairs = [(held, part) for part in self.coarse_parts(mode) for held in (A, B)]
        return [(self._parameters, "weight"), *pairs] if pairs else []

    def coarse_merge(self, mode: Mode, fixed: object, device: torch.device) -> bool:
        """Make or renew the weight with a mode's updates added in, where that is allowed.

        Another class than `torch.nn.Linear` computes more than its weight says, as a
        parametrization does; a quantised weight holds no numbers to add to, and an offloaded one is
        on another device than the latent: these keep their update apart.

        Args:
            fixed: what else, besides versions of tensors, the merged weight depends on.

        Returns:
            Whether the layer has no update that it keeps apart.
        """
        places = self.coarse_places(mode)
        if not places:
            return True
        linear = getattr(type(self), MADE_OF)[0] is nn.Linear and "weight" in self._parameters
        if not linear or not is_summable(self.weight) or self.weight.device != device:
            self.__dict__.pop(MERGED, None)
            return False
        weight, *pairs = [held[name] for held, name in places]
        cache, key = self.__dict__.setdefault(MERGED, {}), "_".join(self.coarse_parts(mode))
        version = fixed, versions(weight, *pairs)
        if cache.get(key, (None,))[0] != version:
            stale = cache.get(key)
            for name in [name for name, kept in cache.items() if kept is stale]:
                del cache[name]
            for A, B in zip(pairs[::2], pairs[1::2], strict=True):
                weight = torch.addmm(weight, B, A)
            cache[key] = (version, weight.detach())
        cache[mode.name] = cache[key]  # one copy for all widths
        return True


class FusedSeam(LowRankSeam):
    """Mixed into a projection that stands for several: adds their updates, side by side."""

    @property
    def coarse_A(self) -> nn.ParameterDict:  # pyrefly: ignore[bad-override]
        """Of one of the layers it was made of: they have the same modes."""
        return next(part.coarse_A for part in self._parts() if isinstance(part, LowRankSeam))

    def coarse_update(
        self, x: Tensor, mode: Mode, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> Tensor:
        """What the updates of all its layers add, side by side."""
        assert rows is None, "fused projections are refused in routed modes"
        assert columns is None, "fused projections are refused in routed modes"
        return torch.cat(
            [
                part.coarse_update(x, mode)
                if isinstance(part, LowRankSeam)
                else x.new_zeros(*x.shape[:-1], part.out_features)
                for part in self._parts()
            ],
            dim=-1,
        )

    def _parts(self) -> list[nn.Linear]:
        return self.__dict__[PARTS]
