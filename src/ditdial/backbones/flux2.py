"""`Flux2Transformer2DModel` (FLUX.2): FLUX with shared modulation and ids of four axes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModelOutput

from ditdial.backbones.arguments import Call
from ditdial.backbones.base import Model
from ditdial.backbones.flux import TEXT, FluxFamily
from ditdial.backbones.layers import attention
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs, with_other_pictures
from ditdial.cost.shape import Attention, TransformerShape
from ditdial.ops.patching import Triple
from ditdial.plan.mode import Mode


class Flux2Times(Times):
    """The pipeline shifts its schedule by a fit of its own."""

    def shift(self, scheduler: dict[str, Any], tokens: int, steps: int) -> float:
        """What the pipeline gives its scheduler as ``mu``."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu  # transformers

        return compute_empirical_mu(tokens, steps)


class Flux2Backbone(FluxFamily):
    """Ids are whole numbers ``(time, row, column, word)``; reference pictures have other times.

    The guided pipeline (klein) calls twice per step; FLUX.2 dev is distilled and opens no
    `cache_context`. Sequences with reference pictures run in full mode.
    """

    model_class = "Flux2Transformer2DModel"
    arguments = replace(
        FluxFamily.arguments,
        condition=("encoder_hidden_states", "txt_ids"),
        output=Flux2Transformer2DModelOutput,
    )
    times = Flux2Times(scale=1.0, own_sigmas=True)
    conditioning = ("time_guidance_embed",)
    low_rank = (
        ("transformer_blocks", (*attention("attn"), "ff.linear_in", "ff.linear_out")),
        ("single_transformer_blocks", ("attn.to_qkv_mlp_proj", "attn.to_out")),
    )

    def references_before(self, call: Call) -> int:
        return call.get("num_ref_tokens", 0)  # those whose keys and values are kept

    def check_call(self, call: Call, mode: Mode) -> None:
        if call.get("kv_cache_mode") is not None:
            raise ValueError(
                f"kv_cache_mode = {call['kv_cache_mode']!r} adds the tokens of reference pictures, "
                f"and mode {mode.name!r} takes none; legal with them: full mode"
            )
        super().check_call(call, mode)

    def shape(
        self, model: Model, grid: Triple, text_tokens: int, others: int = 0
    ) -> TransformerShape:
        config, d, double = model.config, model.inner_dim, model.transformer_blocks
        both = linear_macs(model.single_transformer_blocks)
        once = r"^(time_guidance_embed|(double|single)_stream_modulation|norm_out)"
        shape = TransformerShape(
            width=d,
            grid=grid,
            patch_in=config.in_channels,
            patch_out=model.proj_out.out_features,
            token_macs=linear_macs(double, but=TEXT) + both,
            attention=(Attention(config.num_layers + config.num_single_layers, d, "joint"),),
            text_tokens=text_tokens,
            text_macs=linear_macs(double, TEXT) + both,
            picture_macs=linear_macs(model, once)
            + text_tokens * linear_macs(model, "^context_embedder$"),
            adapted=self.adapted_macs(model),
            adapted_text=self.adapted_macs(model, "^single"),
        )
        return with_other_pictures(shape, others)
