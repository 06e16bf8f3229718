"""`DiTTransformer2DModel` (DiT, 2212.09748): class-conditional, square, CFG in one batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ditdial.backbones.base import Model, pair
from ditdial.backbones.blocks import BlockList
from ditdial.backbones.call import Branches, Call
from ditdial.backbones.layers import embedders
from ditdial.backbones.patch_embed import SELF_ATTENTION_AND_FEED_FORWARD, PatchEmbedBackbone
from ditdial.backbones.routed import Routed
from ditdial.backbones.streamed import Streamed
from ditdial.cost.linears import linear_macs
from ditdial.ops.patching import Triple
from ditdial.plan.mode import Mode


class DiTBackbone(PatchEmbedBackbone):
    """What is known of diffusers' DiT.

    Its time is t in 0..999. The null class is the last label, and the conditional rows come first.
    """

    model_class = "DiTTransformer2DModel"
    output = "proj_out_2"
    condition = ("class_labels",)
    labels = "class_labels"
    facts = (
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "patch_size",
        "in_channels",
    )
    conditional_first = True
    low_rank = (("transformer_blocks", SELF_ATTENTION_AND_FEED_FORWARD),)
    block_lists = (
        BlockList(blocks="transformer_blocks", attention=(("attn1", "self"),), once=r"\.norm1\."),
    )
    streamed = Streamed()
    packs = masks_attention = reads_blocks = True
    routed = (Routed(blocks="transformer_blocks", attention="attn1", residual="norm3"),)
    # Each block has an embedder of its own; the first one's speaks for all.
    time_layers = embedders("transformer_blocks.0.norm1.emb")

    def modulation_layers(self, model: Model) -> Iterator[nn.Module]:
        for block in model.transformer_blocks:
            yield block.norm1.linear
        yield model.proj_out_1

    def attention_layers(self, model: Model) -> Iterator[nn.Module]:
        for block in model.transformer_blocks:
            yield block.attn1

    def conditioning_layers(self, model: Model) -> Iterator[nn.Module]:
        for block in model.transformer_blocks:
            yield block.norm1.emb

    def embedded(self, model: Model) -> Iterator[tuple[nn.Module, list[nn.Linear]]]:
        for index, block in enumerate(model.transformer_blocks):
            last = [model.proj_out_1] if index == 0 else []
            yield block.norm1.emb, [block.norm1.linear, *last]

    def branches(self, model: Model, call: Call, pipe: Any) -> Branches | None:
        labels = call.get("class_labels")
        count = call[self.sample].shape[0]
        if labels is None or count % 2 or labels.numel() != count:
            return None
        null = model.config.num_embeds_ada_norm
        half = count // 2
        is_null = (labels.reshape(-1) == null).tolist()
        if all(is_null[half:]) and not any(is_null[:half]):
            return Branches(slice(0, half), slice(half, count))
        return None

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (1, *pair(model.config.sample_size, model.config.patch_size)), 0

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        # Time and label are embedded once more for the output, as the first block does.
        again = linear_macs(model.transformer_blocks[0].norm1.emb)
        return again + linear_macs(model.proj_out_1)

    def identity(self, model: Model) -> dict[str, Any]:
        return super().identity(model) | {
            "out_channels": model.out_channels,
            "num_classes": model.config.num_embeds_ada_norm,
        }

    def check(self, model: Model, modes: set[Mode]) -> None:
        super().check(model, modes)
        for mode in modes:
            self.check_grid(self.default_size(model)[0], mode)
