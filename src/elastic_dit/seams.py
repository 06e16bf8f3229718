"""What the swapped submodules do: the places where a coarse mode differs from the stock forward.

Each seam is mixed in front of a stock class by `elastic_dit.routing.swap_class`; it looks at the
router and either calls the stock ``forward`` or takes the coarse way.

Packing. Two branches in different modes can share one call. Their tokens are laid out in strips,
``(strips of all, strip, D)``, whose length divides the token counts of both: 64 and 16 tokens make
strips of 16. Norms and feed-forward work token by token and need no change; only modulation (one
vector per picture, repeated for its strips) and attention know about the layout. The latter takes
the parts one by one, or regroups them by picture under a block-diagonal mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from elastic_dit.backbones.call import cut
from elastic_dit.mode import FULL, Mode
from elastic_dit.pickling import MADE_OF
from elastic_dit.routing import MERGED, PARTS, ROUTER, TEXT, Part, Router, TextKey, versions
from elastic_dit.storage import check_latent, is_summable

DELEGATING = Attention.forward
"""Does what its processor does, and reads the processor's signature first, to tell which of the
arguments are for it. That takes a fiftieth of a small model's coarsest step, and there are none.
"""

PROMPTS = 3
"""Prompts whose text layers are kept: a run's own, its negative one, and both in one batch."""


class EmbedSeam(nn.Module):
    """Mixed into the module that makes tokens (and, in some classes, adds positions)."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Base tokens in full mode; grouped tokens at the centres of their groups otherwise.

        The latent is the last of the inputs; where there are others, rows are not packed.

        Raises:
            RuntimeError: the forward pass did not come through the elastic model.
        """
        router: Router = self.__dict__[ROUTER]
        if not router.running:
            raise RuntimeError(
                "this model's forward was replaced after elastify, so that no mode is chosen; "
                "replace it before elastify, or on the diffusers class"
            )
        if router.layout is None:
            return self._tokens(router, router.mode, *inputs)
        pieces = inputs[-1].split([part.rows for part in router.layout])
        return router.pack(
            [
                self._tokens(router, part.mode, x)
                for x, part in zip(pieces, router.layout, strict=True)
            ]
        )

    def _tokens(self, router: Router, mode: Mode, *inputs: Tensor) -> Tensor:
        if not router.sizes.routes(mode):
            return super().forward(*inputs)  # pyrefly: ignore[missing-attribute]
        if not torch.compiler.is_compiling():
            check_latent(inputs[-1], router.sizes, mode)
        tokens = router.backbone.tokens(self, router, mode, inputs[-1])
        return router.backbone.beside(self, tokens, *inputs[:-1])


class RotarySeam(nn.Module):
    """Mixed into the module that makes the rotary phases of a grid."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stock phases in full mode; those of the groups' centres otherwise."""
        router: Router = self.__dict__[ROUTER]
        stock = functools.partial(super().forward, **kwargs)  # pyrefly: ignore[missing-attribute]
        if not router.sizes.routes(router.mode):
            return stock(*args)
        return router.backbone.phases(self, router, router.mode, stock, args)


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
        stock = super().forward  # pyrefly: ignore[missing-attribute]
        return router.backbone.base_vectors(router, mode, stock, hidden)


class ModulationSeam(nn.Module):
    """Mixed into a module that modulates all tokens of a picture: repeats what it returns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Modulation of each picture, or one row of it per packed token."""
        modulation = super().forward(*args, **kwargs)  # pyrefly: ignore[missing-attribute]
        router: Router = self.__dict__[ROUTER]
        if router.layout is None:
            return modulation
        layout, strip = router.layout, router.strip
        owners = router.constant(("owners", layout), lambda: _owners(layout, strip))
        if isinstance(modulation, tuple):
            return tuple(x.index_select(0, owners) for x in modulation)
        return modulation.index_select(0, owners)


def _owners(layout: tuple[Part, ...], strip: int) -> Tensor:
    """The row of the batch that each packed strip belongs to."""
    rows = torch.arange(sum(part.rows for part in layout)).split([part.rows for part in layout])
    return torch.cat(
        [
            own.repeat_interleave(part.tokens // strip)
            for own, part in zip(rows, layout, strict=True)
        ]
    )


class AttentionSeam(nn.Module):
    """Mixed into attention: lets packed tokens see those of their own picture alone.

    It runs part by part, or, where the router says so and there is no text, once for all parts
    under a block-diagonal mask.
    """

    processor: Callable[..., Any]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Stock attention unless the batch is packed."""
        router: Router = self.__dict__[ROUTER]
        stock = super().forward  # pyrefly: ignore[missing-attribute]
        delegates = not torch.compiler.is_compiling()
        if delegates and getattr(stock, "__func__", None) is DELEGATING and not kwargs:
            nothing = {"encoder_hidden_states": None, "attention_mask": None}
            stock = functools.partial(self.processor, self, **nothing)
        if router.layout is None:
            if encoder_hidden_states is not None:
                kwargs["encoder_hidden_states"] = encoder_hidden_states
            if attention_mask is not None:
                kwargs["attention_mask"] = attention_mask
            return stock(hidden_states, **kwargs)
        if encoder_hidden_states is not None or not router.masked:
            text, mask = encoder_hidden_states, attention_mask
            return _part_by_part(router, stock, hidden_states, text, mask, kwargs)
        rows = router.layout[0].rows
        lengths = [part.tokens for part in router.layout]
        pieces = router.unpack(hidden_states)
        joined = torch.cat(pieces, dim=1)
        key = "apart", *lengths, joined.dtype
        mask = router.constant(key, lambda: _apart(lengths, joined.dtype))
        router.joined = joined, pieces
        try:
            out = stock(joined, attention_mask=mask.expand(rows, -1, -1), **kwargs)
        finally:
            router.joined = None
        return router.pack(list(out.split(lengths, dim=1)))


def _apart(lengths: list[int], dtype: torch.dtype) -> Tensor:
    """What is added to the scores of sequences that stand in one row, ``(tokens, tokens)``."""
    same = torch.block_diag(*[torch.ones(n, n, dtype=torch.bool) for n in lengths])
    return torch.zeros(same.shape, dtype=dtype).masked_fill(~same, -torch.inf)


def _part_by_part(
    router: Router,
    stock: Callable[..., Any],
    packed: Tensor,
    text: Tensor | None,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Any:
    """Attention of each part by itself; returns what the stock layer returns."""
    layout, mode, pieces = router.layout, router.mode, router.unpack(packed)
    assert layout is not None
    sizes = [part.rows for part in layout]
    texts = [None] * len(layout) if text is None else text.split(sizes)
    masks = [None] * len(layout) if mask is None else mask.split(sizes)
    outputs = []
    router.layout = None
    try:
        for part, x, own_text, own_mask in zip(layout, pieces, texts, masks, strict=True):
            router.mode = part.mode
            own = {"encoder_hidden_states": own_text, "attention_mask": own_mask}
            given = {name: value for name, value in own.items() if value is not None}
            first = sum(sizes[: len(outputs)])
            rows = slice(first, first + part.rows)
            outputs.append(stock(x, **given, **cut(kwargs, rows, sum(sizes))))
    finally:
        router.layout, router.mode = layout, mode
    if isinstance(outputs[0], tuple):  # joint attention returns the text's tokens too
        images, texts = zip(*outputs, strict=True)
        return router.pack(list(images)), torch.cat(texts)
    return router.pack(outputs)


class TextSeam(nn.Module):
    """Mixed into a layer that only sees the prompt: keeps its output for the rest of a run."""

    weight: Tensor

    def forward(self, text: Tensor) -> Tensor:
        """Stock output, computed once per prompt while the router names one."""
        router: Router = self.__dict__[ROUTER]
        stock = super().forward  # pyrefly: ignore[missing-attribute]
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return stock(text)
        if router.text is None or router.layout is not None:
            return stock(text)
        kept: list[tuple[TextKey, object, Tensor]] = self.__dict__.setdefault(TEXT, [])
        version = versions(self.weight)
        for key, weights, output in kept:
            if key.same(router.text) and weights == version:
                return output
        output = stock(text)
        kept[:] = [*kept[-(PROMPTS - 1) :], (router.text, version, output)]
        return output


class ConditioningSeam(nn.Module):
    """Mixed into a module that makes the conditioning vector, in which a method may mark modes."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``(B, D)``, each row for its own mode."""
        router: Router = self.__dict__[ROUTER]
        vector = super().forward(*args, **kwargs)  # pyrefly: ignore[missing-attribute]
        if router.layout is None:
            return router.sizes.condition(vector, router.mode)
        pieces = vector.split([part.rows for part in router.layout])
        return torch.cat(
            [
                router.sizes.condition(piece, part.mode)
                for piece, part in zip(pieces, router.layout, strict=True)
            ]
        )


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
        modes = [part.mode for part in layout]
        if router.joined is None:
            return self._spread(router, modes, x, x.split(router.strips), dim=0)
        joined, pieces = router.joined  # (pictures, tokens of all parts, D)
        if x is not joined:
            pieces = x.split([part.tokens for part in layout], dim=1)
        return self._spread(router, modes, x, pieces, dim=1)

    def _at(self, router: Router, x: Tensor, mode: Mode) -> Tensor:
        merged = None if mode is FULL else self.coarse_merged(mode)
        if merged is not None:
            return F.linear(x, merged[1], self.bias)
        if mode is FULL or not self.coarse_parts(mode):
            return super().forward(x)  # pyrefly: ignore[missing-attribute]
        return super().forward(x) + self.coarse_update(x, mode)  # pyrefly: ignore[missing-attribute]

    def _spread(
        self, router: Router, modes: list[Mode], x: Tensor, pieces: Sequence[Tensor], dim: int
    ) -> Tensor:
        """Each part in its own mode; ``x`` is the parts joined along ``dim``."""
        if any(self.coarse_merged(mode) is not None for mode in modes):
            casts = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
            if dim == 0 and not casts:
                return self._written(modes, x, pieces)
            # Of what is not contiguous torch would make a product, and a sum for the bias.
            each = zip(pieces, modes, strict=True)
            return torch.cat([self._at(router, x.contiguous(), m) for x, m in each], dim=dim)
        base = super().forward(x)  # pyrefly: ignore[missing-attribute]
        sizes = [piece.shape[dim] for piece in pieces]
        for mode, piece, own in zip(modes, pieces, base.split(sizes, dim=dim), strict=True):
            if self.coarse_parts(mode):
                own.add_(self.coarse_update(piece, mode))
        return base

    def _written(self, modes: list[Mode], x: Tensor, pieces: Sequence[Tensor]) -> Tensor:
        """Rows of each part times the weight of its mode, with no copy of what comes out."""
        out = x.new_empty(*x.shape[:-1], len(self.weight))
        rows = out.split([len(piece) for piece in pieces])
        for mode, piece, own in zip(modes, pieces, rows, strict=True):
            merged = self.coarse_merged(mode)
            weight = (self.weight if merged is None else merged[1]).T
            given, into = piece.flatten(0, -2), own.flatten(0, -2)
            if self.bias is None:
                torch.mm(given, weight, out=into)
            else:
                torch.addmm(self.bias, given, weight, out=into)
        return out

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
        parametrisation does; a quantised weight holds no numbers to add to, and an offloaded one is
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
