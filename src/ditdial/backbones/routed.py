"""Which layers of a block heads, channels and tokens go through: what routed modes leave out.

A backbone names them once per list of blocks. A head has rows in the layers that make queries, keys
and values, and columns in those that take what attention returns; a channel has rows on the way
into the feed-forward and columns on the way out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from ditdial.cost.linears import Linear, Side
from ditdial.host.loras import innermost


@dataclass(frozen=True, kw_only=True)
class Routed:
    """The routed layers of one list of blocks, as names inside a block.

    Args:
        blocks: the list.
        attention: module whose heads are routed.
        inputs, outputs: its layers before and after the heads, by name inside it.
        text_inputs, text_outputs: those of the text's tokens, where they attend jointly.
        norms: norms over all its heads at once.
        widen, narrow: layers with a row, or a column, for each channel.
        shared: ``narrow`` has a column for each head feature before those of the channels.
        residual: module that is given the residual stream before what tokens may skip; None if
            they may not.
        feed_forward: module that they skip; None for ``widen`` and ``narrow``, one by one, which
            text tokens, that come first, do not skip.
    """

    blocks: str
    attention: str
    inputs: tuple[str, ...] = ("to_q", "to_k", "to_v")
    outputs: tuple[str, ...] = ("to_out.0",)
    text_inputs: tuple[str, ...] = ()
    text_outputs: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    widen: str = "ff.net.0.proj"
    narrow: str = "ff.net.2"
    shared: bool = False
    residual: str | None = None
    feed_forward: str | None = "ff"

    def of(self, model: Any) -> Iterator[RoutedBlock]:
        """The modules of each block, its layers without the wrappers of LoRAs.

        Layers that are None in a block, as the text's output layer in a model's last block may be,
        are left out.
        """
        for index, block in enumerate(model.get_submodule(self.blocks)):
            attention = block.get_submodule(self.attention)

            def layers(names: tuple[str, ...], owner: Any = attention) -> tuple[Any, ...]:
                # The last block of a model may end its text without an output layer.
                found = (functools.reduce(getattr, name.split("."), owner) for name in names)
                return tuple(innermost(layer) for layer in found if layer is not None)

            residual, forward = self.residual, self.feed_forward
            yield RoutedBlock(
                name=f"{self.blocks}.{index}",
                attention=attention,
                inputs=layers(self.inputs),
                outputs=layers(self.outputs),
                text_inputs=layers(self.text_inputs),
                text_outputs=layers(self.text_outputs),
                norms=layers(self.norms),
                widen=innermost(block.get_submodule(self.widen)),
                narrow=innermost(block.get_submodule(self.narrow)),
                shared=self.shared,
                residual=None if residual is None else block.get_submodule(residual),
                feed_forward=None if forward is None else block.get_submodule(forward),
            )

    def linear(self, name: str, layer: Any, width: int) -> Linear:
        """What narrows the inputs and the outputs of a layer.

        Args:
            name: of the layer in a block.
            width: head features of the block.
        """
        inputs: Side = {"nothing": layer.in_features}
        outputs: Side = {"nothing": layer.out_features}
        owner, _, own = name.partition(".")
        heads = own if owner == self.attention else ""
        if name == self.widen:
            outputs = {"channels": layer.out_features}
        elif name == self.narrow and self.shared:
            inputs = {"heads": width, "channels": layer.in_features - width}
        elif name == self.narrow:
            inputs = {"channels": layer.in_features}
        elif heads in (*self.inputs, *self.text_inputs):
            outputs = {"heads": layer.out_features}
        elif heads in (*self.outputs, *self.text_outputs):
            inputs = {"heads": layer.in_features}
        return Linear(inputs, outputs)


JOINT: dict[str, Any] = {
    "attention": "attn",
    "text_inputs": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "text_outputs": ("to_add_out",),
}
"""Attention over text and picture with layers of its own for each, as SD3 and FLUX have it."""

SINGLE: dict[str, Any] = {
    "attention": "attn",
    "outputs": (),
    "widen": "proj_mlp",
    "narrow": "proj_out",
    "shared": True,
    "feed_forward": None,
}
"""FLUX's single blocks: one layer takes what attention returns and the channels."""


def has_fused(attention: Any) -> bool:
    """Whether its processor takes queries, keys and values from one layer at present.

    Older attention keeps the layer and its mark when it is unfused, and changes the processor.
    """
    fused = getattr(attention, "fused_projections", False)
    return fused and (
        not isinstance(attention, Attention)
        or type(attention.processor).__name__.startswith("Fused")
    )


@dataclass(frozen=True, kw_only=True)
class RoutedBlock:
    """The modules of one block that routed modes narrow; see `Routed`."""

    name: str
    attention: Any
    inputs: tuple[nn.Linear, ...]
    outputs: tuple[nn.Linear, ...]
    text_inputs: tuple[nn.Linear, ...]
    text_outputs: tuple[nn.Linear, ...]
    norms: tuple[nn.Module, ...]
    widen: nn.Linear
    narrow: nn.Linear
    shared: bool
    residual: nn.Module | None
    feed_forward: nn.Module | None
    heads: int = field(init=False)
    width: int = field(init=False)
    channels: int = field(init=False)

    def __post_init__(self) -> None:
        width = self.inputs[0].out_features
        object.__setattr__(self, "heads", self.attention.heads)
        object.__setattr__(self, "width", width)
        columns = self.narrow.in_features - (width if self.shared else 0)
        object.__setattr__(self, "channels", columns)

    @property
    def layers(self) -> tuple[nn.Linear, ...]:
        """Every linear layer that is narrowed."""
        text = (*self.text_inputs, *self.text_outputs)
        return (*self.inputs, *self.outputs, *text, self.widen, self.narrow)
