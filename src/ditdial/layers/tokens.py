"""What the swapped submodules do: the places where a coarse mode differs from the stock forward.

Each seam is mixed in front of a stock class by `ditdial.layers.state.swap_class`; it looks at the
router and either calls the stock ``forward`` or takes the coarse way.

Of a packed call (`ditdial.layers.packing`), modulation repeats the vector of each picture for its
strips, and other seams take the parts one by one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ditdial.backbones.call import cut
from ditdial.host.weights import check_latent, versions
from ditdial.layers.state import ROUTER, TEXT, Router, TextKey

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
        layout, mode = router.layout, router.mode
        if layout is not None:
            run = functools.partial(EmbedSeam.forward, self)
            return layout.pack(router.each(run, inputs[-1].split(layout.rows)))
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
        stock = super().forward  # pyrefly: ignore[missing-attribute]
        if router.layout is not None:
            run = functools.partial(OutputSeam.forward, self)
            return torch.cat(router.each(run, router.layout.unpack(hidden)))
        if not router.sizes.routes(router.mode):
            return stock(hidden)
        return router.backbone.base_vectors(router, router.mode, stock, hidden)


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
    """Mixed into attention: packed tokens see those of their own part alone."""

    processor: Callable[..., Any]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Stock attention, part by part if the batch is packed; returns what the layer returns."""
        router: Router = self.__dict__[ROUTER]
        stock = super().forward  # pyrefly: ignore[missing-attribute]
        compiling = torch.compiler.is_compiling()  # a graph cannot tell whose forward this is
        if not (kwargs or compiling) and getattr(stock, "__func__", None) is DELEGATING:
            nothing = {"encoder_hidden_states": None, "attention_mask": None}
            stock = functools.partial(self.processor, self, **nothing)
        given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
        given = {name: value for name, value in given.items() if value is not None} | kwargs
        layout = router.layout
        if layout is None:
            return stock(hidden_states, **given)
        starts = itertools.accumulate(layout.rows, initial=0)
        rows = [slice(first, first + n) for first, n in zip(starts, layout.rows, strict=False)]
        pieces = [
            (x, cut(given, own, sum(layout.rows)))
            for x, own in zip(layout.unpack(hidden_states), rows, strict=True)
        ]
        outputs = router.each(lambda piece: stock(piece[0], **piece[1]), pieces)
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
        pieces = vector.split(router.layout.rows)
        return torch.cat(router.each(lambda x: router.sizes.condition(x, router.mode), pieces))
