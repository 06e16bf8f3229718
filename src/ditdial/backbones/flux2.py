"""`Flux2Transformer2DModel` (FLUX.2): FLUX with shared modulation and ids of four axes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModelOutput

from ditdial.backbones.arguments import Call
from ditdial.backbones.base import Model
from ditdial.backbones.flux import FluxFamily
from ditdial.backbones.layers import attention
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
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
    `cache_context`. Reference pictures stand behind the one to make; those whose keys and values
    are kept stand before it, and run in full mode.
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

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        once = r"^(time_guidance_embed|(double|single)_stream_modulation|norm_out)"
        return linear_macs(model, once) + text_tokens * linear_macs(model.context_embedder)
