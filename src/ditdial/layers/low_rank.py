"""Low-rank updates of coarse modes in linear layers, unmerged or merged into the weight."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditdial.host.pickling import MADE_OF
from ditdial.host.weights import is_summable, versions
from ditdial.layers.wiring import wiring_of
from ditdial.plan.mode import FULL, Mode

MERGED = "_ditdial_merged"
"""Attribute of an adapted layer: its weights with a mode's updates added in, by mode."""

PARTS = "_ditdial_parts"
"""Attribute of a fused projection: the layers that it stands for."""


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
        """Stock linear layer plus the low-rank update of each token's mode.

        ``(..., in) -> (..., out)``. Full mode is the stock layer alone; a mode whose weights are
        merged is one product with the merged weight.
        """
        state = wiring_of(self).state
        mode = state.mode
        if state.layout is not None:
            pieces = x.split(state.layout.strips)
            weights = self._only_weights(x, state.modes)
            if weights:
                return self._side_by_side(pieces, weights)
            return torch.cat(state.each(functools.partial(LowRankSeam.forward, self), pieces))
        stock = super().forward  # pyrefly: ignore[missing-attribute]
        if mode is FULL:  # before any look-up: full mode pays for one comparison
            return stock(x)
        merged = self.coarse_merged(mode)
        if merged is not None:
            return F.linear(x, merged[1], self.bias)
        return stock(x) + self.coarse_update(x, mode) if self.coarse_parts(mode) else stock(x)

    def _only_weights(self, x: Tensor, modes: Sequence[Mode]) -> list[Tensor]:
        """The weight of each mode's product, if that is all the layer does; else none of them."""
        plain = getattr(type(self), MADE_OF)[0] is nn.Linear and "weight" in self._parameters
        must_not = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
        if not plain or must_not or not (x.is_contiguous() and is_summable(self.weight)):
            return []
        weights = []
        for mode in modes:
            merged = None if mode is FULL else self.coarse_merged(mode)
            if merged is None and mode is not FULL and self.coarse_parts(mode):
                return []
            weights.append(self.weight if merged is None else merged[1])
        return weights

    def _side_by_side(self, pieces: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """The product of each piece with a weight of its own, written where it belongs.

        Joining them afterwards would copy all of it once more.
        """
        rows = sum(len(piece) for piece in pieces)
        out = pieces[0].new_empty(rows, *pieces[0].shape[1:-1], len(weights[0]))
        places = out.split([len(piece) for piece in pieces])
        for piece, weight, place in zip(pieces, weights, places, strict=True):
            flat, target = piece.flatten(0, -2), place.flatten(0, -2)
            if self.bias is None:
                torch.mm(flat, weight.T, out=target)
            else:
                torch.addmm(self.bias, flat, weight.T, out=target)
        return out

    def coarse_parts(self, mode: Mode) -> list[str]:
        """Keys of a mode's pairs."""
        held = self.coarse_A._parameters  # torch's own look-up takes longer than all the rest
        return [part for part in mode.parts if part in held]

    def coarse_merged(self, mode: Mode) -> tuple[object, Tensor] | None:
        """The weight with a mode's updates added in, where that is in use, behind its version."""
        # A weight that a LoRA changes for the time of the pass is not the one in the merged weight.
        if not wiring_of(self).state.merging or "weight" not in self._parameters:
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

    def coarse_merge(self, mode: Mode, fixed: object, device: torch.device) -> str | None:
        """Make or renew the weight with a mode's updates added in, where that is allowed.

        Args:
            fixed: what else, besides versions of tensors, the merged weight depends on.

        Returns:
            Why the updates of the layer stay unmerged; None if they do not.
        """
        places = self.coarse_places(mode)
        if not places:
            return None
        reason = self._unmerged_because(device)
        if reason is not None:
            self.__dict__.pop(MERGED, None)
            return reason
        weight, *pairs = [held[name] for held, name in places]
        cache, key = self.__dict__.setdefault(MERGED, {}), "_".join(self.coarse_parts(mode))
        version = fixed, versions(weight, *pairs)
        if cache.get(key, (None,))[0] != version:
            # Modes of the same parts share one copy; all let go of the old before the new is made.
            stale = cache.get(key)
            for name in [name for name, kept in cache.items() if kept is stale]:
                del cache[name]
            for A, B in zip(pairs[::2], pairs[1::2], strict=True):
                weight = torch.addmm(weight, B, A)
            cache[key] = (version, weight.detach())
        cache[mode.name] = cache[key]  # one copy for all widths
        return None

    def _unmerged_because(self, device: torch.device) -> str | None:
        stock = getattr(type(self), MADE_OF)[0]
        if stock is not nn.Linear:  # a LoRA, say: it computes more than its weight says
            return f"of class {stock.__module__}.{stock.__qualname__}"
        if "weight" not in self._parameters:
            return "with a parametrised weight"
        if not is_summable(self.weight):
            return "with weights that are quantised or in eight bits"
        return None if self.weight.device == device else "with offloaded weights"


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
