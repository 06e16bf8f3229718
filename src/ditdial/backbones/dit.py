"""`DiTTransformer2DModel` (DiT, 2212.09748): class-conditional, square, CFG in one batch."""

from __future__ import annotations

from typing import Any

from ditdial.backbones.arguments import Arguments, Branches, Call
from ditdial.backbones.base import Model
from ditdial.backbones.blocks import BlockList
from ditdial.backbones.layers import Packed, embedders
from ditdial.backbones.patch_embed import SELF_ATTENTION_AND_FEED_FORWARD, PatchEmbedBackbone
from ditdial.backbones.patches import Patches
from ditdial.backbones.routed import Routed
from ditdial.backbones.sizes import Sizes, pair
from ditdial.backbones.streamed import Streamed
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.ops.patching import Triple
from ditdial.plan.mode import Mode


class LabelledArguments(Arguments):
    """Guidance rows have the null class, which is the last label."""

    def branches(self, model: Model, call: Call, guided: bool | None) -> Branches | None:
        """The guidance layout of a batched call, None if all rows are conditional."""
        labels, count = call.get("class_labels"), self.count(call)
        if labels is None or count % 2 or labels.numel() != count:
            return None
        half = count // 2
        is_null = (labels.reshape(-1) == model.config.num_embeds_ada_norm).tolist()
        if all(is_null[half:]) and not any(is_null[:half]):
            return Branches(slice(0, half), slice(half, count))
        return None


class DiTBackbone(PatchEmbedBackbone):
    """What is known of diffusers' DiT.

    Its time is t in 0..999. The null class is the last label, and the conditional rows come first.
    """

    model_class = "DiTTransformer2DModel"
    patches = Patches(embed="pos_embed", output="proj_out_2")
    arguments = LabelledArguments(condition=("class_labels",), conditional_first=True)
    times = Times(layers=embedders("transformer_blocks.0.norm1.emb"))
    sizes = Sizes(one="its bases were trained at one size each", square=True)
    facts = (
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "patch_size",
        "in_channels",
    )
    low_rank = (("transformer_blocks", SELF_ATTENTION_AND_FEED_FORWARD),)
    block_lists = (
        BlockList(blocks="transformer_blocks", attention=(("attn1", "self"),), once=r"\.norm1\."),
    )
    streamed = Streamed()
    reads_blocks = True
    packed = Packed(
        modulation=("transformer_blocks.*.norm1.linear", "proj_out_1"),
        attention=("transformer_blocks.*.attn1",),
    )
    conditioning = ("transformer_blocks.*.norm1.emb",)
    sinusoids = ("transformer_blocks.*.norm1.emb.time_proj",)
    routed = (Routed(blocks="transformer_blocks", attention="attn1", residual="norm3"),)
    # Each block has an embedder of its own; the first one's speaks for all.

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
