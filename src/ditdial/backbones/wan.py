"""`WanTransformer3DModel` (Wan 2.1 and 2.2): video, cross-attention, rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ditdial.backbones.arguments import Arguments, Call, grouped_times, has_token_times
from ditdial.backbones.base import COMMON_FACTS, Backbone, Model
from ditdial.backbones.blocks import CROSS_BLOCKS
from ditdial.backbones.forward import Embed, Forward
from ditdial.backbones.layers import attention, feed_forward
from ditdial.backbones.patches import Patches
from ditdial.backbones.routed import Routed
from ditdial.backbones.sizes import Sizes
from ditdial.backbones.streamed import Streamed
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.cost.shape import TransformerShape
from ditdial.ops.patching import Triple
from ditdial.ops.positions import real_rotary_centres
from ditdial.plan.mode import Mode
from ditdial.plan.spectrum import WAN_VAE


class WanBackbone(Backbone):
    """Two calls per step; 2.2 5B gives each token a time of its own (the first frame has none)."""

    model_class = "WanTransformer3DModel"
    patches = Patches(embed="patch_embedding", output="proj_out")
    arguments = Arguments(
        condition=("encoder_hidden_states", "encoder_hidden_states_image"), conditional_first=None
    )
    times = Times(layers=("condition_embedder.timesteps_proj", "condition_embedder.time_embedder"))
    sizes = Sizes(flat_masks=4, spectrum=WAN_VAE)
    rotary = "rope"
    facts = (*COMMON_FACTS, "ffn_dim", "text_dim")
    axes = "thw"
    block_lists = (replace(CROSS_BLOCKS, blocks="blocks", text=r"attn2\.(to_[kv]|add_[kv]_proj)$"),)
    low_rank = (("blocks", (*attention("attn1"), *feed_forward("ffn"))),)
    conditioning = ("condition_embedder.time_embedder",)
    prompt_only = (("blocks", ("attn2.to_k", "attn2.to_v")),)
    routed = (
        Routed(
            blocks="blocks",
            attention="attn1",
            norms=("norm_q", "norm_k"),
            widen="ffn.net.0.proj",
            narrow="ffn.net.2",
            residual="norm3",
            feed_forward="ffn",
        ),
    )
    streamed = Streamed(
        blocks=("blocks",),
        arguments=("hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb"),
        phases="rotary_emb",
    )

    def tokens(
        self, module: Model, forward: Forward, mode: Mode, latent: Tensor, embed: Embed
    ) -> Tensor:
        tokens = super().tokens(module, forward, mode, latent, embed)
        return self.as_volume(tokens, forward, mode)

    def phases(
        self, module: Model, forward: Forward, mode: Mode, stock: Callable[..., Any], args: tuple
    ) -> Any:
        cos, sin = (table[0, :, 0] for table in stock(*args))
        centres = real_rotary_centres(cos.float(), sin.float(), forward.grid, mode.patch_scale)
        return tuple(table[None, :, None].to(cos) for table in centres)

    def prepare(self, call: Call, forward: Forward, mode: Mode) -> Call:
        if not has_token_times(call):
            return call
        return call | {"timestep": grouped_times(call["timestep"], forward.grid, mode)}

    def check_call(self, call: Call, mode: Mode) -> None:
        super().check_call(call, mode)
        if mode.is_sparse and has_token_times(call):
            raise ValueError(
                f"timestep has a time for each base token, and blocks of mode {mode.name!r} see "
                "others; legal: one time per row, or full mode"
            )

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (21, 30, 52), 512

    def size(self, model: Model, call: Call) -> tuple[Any, ...]:
        return *super().size(model, call), has_token_times(call)

    def planned_size(
        self,
        grid: Triple,
        text_tokens: int,
        pipe: Any,
        *,
        token_times: bool | None = None,
        **others: Any,
    ) -> tuple[Any, ...]:
        if token_times is None:
            token_times = pipe is not None and pipe.config.get("expand_timesteps", False)
        return *super().planned_size(grid, text_tokens, pipe, **others), token_times

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        return text_tokens * linear_macs(model.condition_embedder, "^text_embedder")

    def shape(
        self, model: Model, grid: Triple, text_tokens: int, times_per_token: bool = False
    ) -> TransformerShape:
        shape = super().shape(model, grid, text_tokens)
        times = linear_macs(model.condition_embedder, "^time")
        return shape.with_times(times, per_token=times_per_token)
