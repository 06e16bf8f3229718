"""Which tokens go through the layers of a block: what the cost of a class is made of.

A backbone says so once per list of blocks, in names inside a block. The widths are read off a live
model, for the multiply-adds of a block and for those of its low-rank updates alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from ditdial.backbones.layers import MODULATION
from ditdial.backbones.routed import Routed
from ditdial.cost.blocks import Term
from ditdial.cost.linears import Linear, linear_macs, linears

ASKS = {"to_q": "query", "to_out.0": "query", "to_k": "key", "to_v": "key"}
"""Which tokens go through the layers of an attention within the picture."""


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """One list of blocks.

    Args:
        blocks: its name in the model.
        attention: modules of a block, as far as it has them, where tokens meet, and which meet
            there: ``self`` (all tokens of a picture), ``joint`` (together with the text's),
            ``cross`` (with the text's), ``spatial`` (within a frame) or ``temporal`` (across).
        text: layers that text tokens alone go through, as a regular expression; they do so for
            every frame where attention is spatial.
        both: text tokens go through all other layers too.
        once: layers that run once per picture, as a regular expression.
    """

    blocks: str
    attention: tuple[tuple[str, str], ...]
    text: str | None = None
    both: bool = False
    once: str = MODULATION

    def once_macs(self, model: Any) -> int:
        """Multiply-adds of one picture in layers that run once for it."""
        return linear_macs(model.get_submodule(self.blocks), self.once)

    def terms(
        self,
        model: Any,
        routed: Routed | None,
        prompt: Collection[str] = (),
        adapted: Collection[str] | None = None,
    ) -> Iterator[tuple[Term, ...]]:
        """What each block multiplies.

        Args:
            routed: the layers of these blocks that routers narrow.
            prompt: names in a block of layers that see the prompt alone, not the step.
            adapted: names in the model of layers with low-rank updates, to count inputs plus
                outputs of these and nothing else.
        """
        for index, block in enumerate(model.get_submodule(self.blocks)):
            found: Counter[tuple[str, str]] = Counter()
            for name, kind in self.attention if adapted is None else ():
                if block._modules.get(name) is not None:
                    narrows = routed is not None and routed.attention == name
                    width = block.get_submodule(name).inner_dim
                    found[kind, "heads" if narrows else "nothing"] += 2 * width
            for name, layer in linears(block):
                linear = _linear(block, name, layer, routed, prompt)
                if adapted is None:
                    sizes = linear.products()
                elif f"{self.blocks}.{index}.{name}" in adapted:
                    sizes = linear.sums()
                else:
                    continue
                for by in self._tokens(name, routed):
                    found.update({(by, narrows): size for narrows, size in sizes.items()})
            yield tuple(Term(each, by, narrows) for (by, narrows), each in found.items())

    def _tokens(self, name: str, routed: Routed | None) -> tuple[str, ...]:
        """Which tokens go through a layer (see `ditdial.cost.blocks.Tokens.counts`)."""
        if re.search(self.once, f".{name}"):
            return ()
        if self.text is not None and re.search(self.text, f".{name}"):
            return ("framed" if any(kind == "spatial" for _, kind in self.attention) else "text",)
        owner, _, layer = name.partition(".")
        by = "stream"
        if dict(self.attention).get(owner, "cross") != "cross":
            by = ASKS.get(layer, by)
        elif routed is not None and name in (routed.widen, routed.narrow):
            by = "entering"
        return (by, "text") if self.both else (by,)


TEXT = r"\.(attn\.(add_|to_add_out)|ff_context)"
"""Layers of the text alone in blocks with joint attention, as SD3 and FLUX have them."""

DOUBLE_BLOCKS = BlockList(blocks="transformer_blocks", attention=(("attn", "joint"),), text=TEXT)
SINGLE_BLOCKS = BlockList(
    blocks="single_transformer_blocks", attention=(("attn", "joint"),), both=True
)
"""FLUX's two kinds of blocks."""

CROSS_BLOCKS = BlockList(
    blocks="transformer_blocks",
    attention=(("attn1", "self"), ("attn2", "cross")),
    text=r"attn2\.to_[kv]$",
)
"""Blocks with an attention of their own for the text, as PixArt has them."""


def _linear(
    block: Any, name: str, layer: Any, routed: Routed | None, prompt: Collection[str]
) -> Linear:
    """A layer, with what can leave out a share of it."""
    if routed is not None and name not in prompt:
        return routed.linear(name, layer, block.get_submodule(routed.attention).inner_dim)
    kind = "prompt" if name in prompt else "nothing"
    return Linear({kind: layer.in_features}, {"nothing": layer.out_features})
