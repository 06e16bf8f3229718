"""What the swapped submodules do: the places where a coarse mode differs from the stock forward.

Each seam is mixed in front of a stock class by `ditdial.layers.state.swap_class`; it looks at the
router and either calls the stock ``forward`` or takes the coarse way.

Of a packed call (`ditdial.layers.packing`), modulation repeats the vector of each picture for its
strips, and attention takes the parts one by one, or regroups them by picture under a mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ditdial.backbones.call import cut
from ditdial.host.weights import check_latent, versions
from ditdial.layers.packing import Layout
from ditdial.layers.state import ROUTER, TEXT, Router, TextKey
from ditdial.plan.mode import Mode

Stock = Callable[..., Any]
"""A stock forward."""

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
        layout, pieces = router.layout, inputs[-1].split(router.layout.rows)
        return layout.pack(
            [self._tokens(router, m, x) for m, x in zip(layout.modes, pieces, strict=True)]
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
        modes, pieces = router.layout.modes, router.layout.unpack(hidden)
        return torch.cat([self._vectors(router, x, m) for x, m in zip(pieces, modes, strict=True)])

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
        layout = router.layout
        owners = router.constant(("owners", layout.parts), layout.owners)
        if isinstance(modulation, tuple):
            return tuple(x.index_select(0, owners) for x in modulation)
        return modulation.index_select(0, owners)


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
        compiling = torch.compiler.is_compiling()  # a graph cannot tell whose forward this is
        if not (kwargs or compiling) and getattr(stock, "__func__", None) is DELEGATING:
            nothing = {"encoder_hidden_states": None, "attention_mask": None}
            stock = functools.partial(self.processor, self, **nothing)
        given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
        given = {name: value for name, value in given.items() if value is not None}
        if router.layout is None:
            return stock(hidden_states, **given, **kwargs)
        if encoder_hidden_states is None and router.layout.masked:
            return _under_a_mask(router, router.layout, stock, hidden_states, kwargs)
        return _part_by_part(router, router.layout, stock, hidden_states, given | kwargs)


def _under_a_mask(
    router: Router, layout: Layout, stock: Stock, packed: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """Attention of all parts at once, each picture's tokens in a row under a mask."""
    pieces = layout.unpack(packed)
    joined = torch.cat(pieces, dim=1)
    key = "apart", layout.tokens, joined.dtype
    mask = router.constant(key, lambda: layout.apart(joined.dtype))
    router.joined = joined, pieces
    try:
        out = stock(joined, attention_mask=mask.expand(len(joined), -1, -1), **kwargs)
    finally:
        router.joined = None
    return layout.pack(out.split(layout.tokens, dim=1))


def _part_by_part(
    router: Router, layout: Layout, stock: Stock, packed: Tensor, kwargs: dict[str, Any]
) -> Any:
    """Attention of each part by itself; returns what the stock layer returns."""
    mode, outputs, first, count = router.mode, [], 0, sum(layout.rows)
    router.layout = None
    try:
        for part, x in zip(layout.parts, layout.unpack(packed), strict=True):
            router.mode = part.mode
            rows = slice(first, first := first + part.rows)
            outputs.append(stock(x, **cut(kwargs, rows, count)))
    finally:
        router.layout, router.mode = layout, mode
    if isinstance(outputs[0], tuple):  # joint attention returns the text's tokens too
        images, texts = zip(*outputs, strict=True)
        return layout.pack(images), torch.cat(texts)
    return layout.pack(outputs)


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
        modes, pieces = router.layout.modes, vector.split(router.layout.rows)
        own = [router.sizes.condition(x, mode) for x, mode in zip(pieces, modes, strict=True)]
        return torch.cat(own)
