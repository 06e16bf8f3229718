"""`HunyuanVideoTransformer3DModel` (HunyuanVideo, 2412.03603): joint attention over video and text.

The text goes through blocks of its own first (the token refiner), at every call and whatever the
mode; its padding is masked by count, behind the video's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ditdial.backbones.arguments import Arguments
from ditdial.backbones.base import COMMON_FACTS, Backbone, Model
from ditdial.backbones.blocks import DOUBLE_BLOCKS, SINGLE_BLOCKS
from ditdial.backbones.forward import Forward
from ditdial.backbones.layers import attention, feed_forward
from ditdial.backbones.patches import Patches
from ditdial.backbones.sizes import Sizes
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.ops.patching import Triple
from ditdial.ops.positions import real_rotary_centres
from ditdial.plan.mode import Mode
from ditdial.plan.spectrum import WAN_VAE

REFINED_ONCE = r"^time_text_embed|norm_out"


class HunyuanVideoBackbone(Backbone):
    """Double blocks, then single blocks; two calls per step with true CFG; channels-first output.

    Image-to-video by ``latent_concat`` adds channels and works; by ``token_replace`` it does not.
    """

    model_class = "HunyuanVideoTransformer3DModel"
    patches = Patches(embed="x_embedder", output="proj_out", output_layout="Cthw")
    arguments = Arguments(
        condition=("encoder_hidden_states", "encoder_attention_mask", "pooled_projections"),
        conditional_first=None,
    )
    times = Times(own_sigmas=True)
    sizes = Sizes(flat_masks=1, spectrum=WAN_VAE)
    rotary = "rope"
    facts = (
        *COMMON_FACTS,
        "num_single_layers",
        "patch_size_t",
        "text_embed_dim",
        "guidance_embeds",
    )
    axes = "thw"
    block_lists = (DOUBLE_BLOCKS, SINGLE_BLOCKS)
    low_rank = (
        ("transformer_blocks", (*attention("attn"), *feed_forward("ff"))),
        ("single_transformer_blocks", (*attention("attn")[:3], "proj_mlp", "proj_out")),
    )

    def phases(
        self, module: Model, forward: Forward, mode: Mode, stock: Callable[..., Any], args: tuple
    ) -> Any:
        cos, sin = stock(*args)
        return real_rotary_centres(cos, sin, forward.grid, mode.patch_scale)

    def check(self, model: Model, modes: set[Mode]) -> None:
        super().check(model, modes)
        if model.config.image_condition_type == "token_replace":
            raise ValueError(
                "image_condition_type = 'token_replace' modulates the first frame's tokens by "
                "their number, which coarse modes change; legal: None, 'latent_concat'"
            )

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (33, 45, 80), 256

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        refiner, config = model.context_embedder, model.config
        d = config.num_attention_heads * config.attention_head_dim
        conditioning = linear_macs(model.time_text_embed) + linear_macs(model.norm_out)
        once = linear_macs(refiner, REFINED_ONCE)
        text = text_tokens * (linear_macs(refiner) - once)
        text += 2 * config.num_refiner_layers * d * text_tokens**2
        return conditioning + once + text
