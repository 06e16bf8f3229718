"""`ChromaTransformer2DModel` (Chroma): FLUX with a masked prompt and one network for modulation."""

from __future__ import annotations

from dataclasses import replace

import torch

from ditdial.backbones.arguments import Call
from ditdial.backbones.base import Model
from ditdial.backbones.flux import FluxFamily
from ditdial.backbones.forward import Forward
from ditdial.backbones.sizes import MaskedIdSizes
from ditdial.cost.linears import linear_macs
from ditdial.ops.patching import group
from ditdial.plan.mode import Mode


class ChromaBackbone(FluxFamily):
    """The attention mask covers text and picture.

    The pipeline calls twice per step with the same latent and opens no `cache_context`.
    """

    model_class = "ChromaTransformer2DModel"
    reads_blocks = True  # modulation by the number of a block
    arguments = replace(
        FluxFamily.arguments,
        condition=("encoder_hidden_states", "attention_mask", "txt_ids", "joint_attention_kwargs"),
    )
    sizes = MaskedIdSizes()
    facts = (
        "num_layers",
        "num_single_layers",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "joint_attention_dim",
        "approximator_hidden_dim",
        "approximator_layers",
    )

    def prepare(self, call: Call, forward: Forward, mode: Mode) -> Call:
        call = super().prepare(call, forward, mode)
        mask, text = call.get("attention_mask"), self.text_tokens(call)
        if mask is None:
            return call
        image, given = self.apart(mask[:, text:, None], forward)
        image = group(image.unflatten(1, forward.grid), mode.patch_scale).amax(dim=2)
        rest = [] if given is None else [given[..., 0]]
        return call | {"attention_mask": torch.cat([mask[:, :text], image, *rest], dim=1)}

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        vectors = len(model.time_text_embed.mod_proj)  # one per shift, scale and gate of all blocks
        modulation = vectors * linear_macs(model.distilled_guidance_layer)
        return super().picture_macs(model, text_tokens) + modulation
