"""`PixArtTransformer2DModel` (PixArt-alpha 2310.00426, PixArt-Sigma 2403.04692)."""

from __future__ import annotations

from ditdial.backbones.arguments import Arguments
from ditdial.backbones.base import COMMON_FACTS, Model
from ditdial.backbones.blocks import CROSS_BLOCKS
from ditdial.backbones.layers import Packed, embedders
from ditdial.backbones.patch_embed import SELF_ATTENTION_AND_FEED_FORWARD, PatchEmbedBackbone
from ditdial.backbones.patches import Patches
from ditdial.backbones.routed import Routed
from ditdial.backbones.sizes import SizedByResolution, pair
from ditdial.backbones.streamed import Streamed
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.ops.patching import Triple


class PixArtBackbone(PatchEmbedBackbone):
    """Cross-attention to the text; one modulation for all blocks; unconditional rows first."""

    model_class = "PixArtTransformer2DModel"
    patches = Patches(embed="pos_embed", output="proj_out")
    arguments = Arguments(condition=("encoder_hidden_states", "encoder_attention_mask"))
    times = Times(layers=embedders("adaln_single.emb"))
    sizes = SizedByResolution(one="its bases were trained for one number of pixels each")
    facts = (*COMMON_FACTS, "caption_channels")
    block_lists = (CROSS_BLOCKS,)
    low_rank = (("transformer_blocks", SELF_ATTENTION_AND_FEED_FORWARD),)
    prompt_only = (("transformer_blocks", ("attn2.to_k", "attn2.to_v")),)
    streamed = Streamed()
    packed = Packed(
        modulation=("adaln_single",),
        attention=("transformer_blocks.*.attn1", "transformer_blocks.*.attn2"),
    )
    conditioning = ("adaln_single.emb",)
    routed = (Routed(blocks="transformer_blocks", attention="attn1", residual="norm2"),)

    def default_size(self, model: Model) -> tuple[Triple, int]:
        # alpha reads 120 tokens, sigma 300; both 256 and 512 of alpha lack the size embeddings
        sigma = model.config.sample_size == 128 and not model.use_additional_conditions
        return (1, *pair(model.config.sample_size, model.config.patch_size)), 300 if sigma else 120

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        conditioning = linear_macs(model.adaln_single)
        if model.use_additional_conditions:  # height and width go through one embedder
            conditioning += linear_macs(model.adaln_single, "resolution_embedder")
        caption = model.caption_projection
        return conditioning + (text_tokens * linear_macs(caption) if caption else 0)
