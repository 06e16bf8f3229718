"""`CogVideoXTransformer3DModel` (CogVideoX, 2408.06072): text and video in one sequence.

Three generations differ in positions: 2B adds sine-cosine ones where it makes tokens, 5B is given
rotary ones by its pipeline (and image-to-video adds learned ones), 1.5 joins two frames per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditdial.backbones.arguments import Call
from ditdial.backbones.base import COMMON_FACTS, Backbone, Model
from ditdial.backbones.blocks import BlockList
from ditdial.backbones.forward import Forward
from ditdial.backbones.layers import attention, feed_forward
from ditdial.backbones.patches import Patches
from ditdial.backbones.sizes import RotarySizes
from ditdial.cost.linears import linear_macs
from ditdial.ops.patching import Triple
from ditdial.ops.positions import group_centres, real_rotary_centres, sincos_3d, table_centres
from ditdial.plan.mode import Mode
from ditdial.plan.spectrum import WAN_VAE


class CogVideoXBackbone(Backbone):
    """Latents have frames before channels; both branches in one batch, unconditional rows first.

    Rotary positions of even groups are right while neighbours are less than half a turn apart,
    which is for videos of at least a third of the native height and width.
    """

    model_class = "CogVideoXTransformer3DModel"
    patches = Patches(embed="patch_embed", output="proj_out", output_layout="Cthw")
    facts = (*COMMON_FACTS, "patch_size_t", "text_embed_dim", "use_rotary_positional_embeddings")
    sizes = RotarySizes(one="its bases were trained at one size", channels=2, spectrum=WAN_VAE)
    axes = "thw"
    block_lists = (
        BlockList(
            blocks="transformer_blocks",
            attention=(("attn1", "joint"),),
            both=True,
            once=r"\.norm[12]\.linear",
        ),
    )
    low_rank = (("transformer_blocks", (*attention("attn1"), *feed_forward("ff"))),)

    def grid(self, model: Model, call: Call) -> Triple:
        latent = self.arguments.latent(call)
        return super().grid(model, {self.arguments.sample: latent.transpose(1, 2)})

    def vectors(self, latent: Tensor, forward: Forward) -> Tensor:
        return super().vectors(latent.transpose(1, 2), forward)

    def beside(self, module: Model, tokens: Tensor, *others: Tensor) -> Tensor:
        (text,) = others
        text = module.text_proj(text)
        if module.use_learned_positional_embeddings:
            text = text + module.pos_embedding[:, : text.shape[1]].to(text.dtype)
        return torch.cat([text, tokens], dim=1)

    def positions(self, module: Model, forward: Forward, mode: Mode) -> Tensor | None:
        grid, scale = forward.grid, mode.patch_scale
        if module.use_learned_positional_embeddings:
            frames = (module.sample_frames - 1) // module.temporal_compression_ratio + 1
            sides = [n // module.patch_size for n in (module.sample_height, module.sample_width)]
            if grid != (frames, *sides):
                raise ValueError(
                    f"hidden_states have a base grid of {grid}, learned positions one of "
                    f"{(frames, *sides)}; legal in coarse modes: the same"
                )
            stored = module.pos_embedding[0, module.max_text_seq_length :]
            return table_centres(stored.unflatten(0, grid), scale)[None]
        if not module.use_positional_embeddings:
            return None
        units = module.temporal_interpolation_scale, *[module.spatial_interpolation_scale] * 2

        def table() -> Tensor:
            frames, rows, columns = (
                group_centres(side, k) / unit
                for side, k, unit in zip(grid, scale, units, strict=True)
            )
            return sincos_3d(frames, rows, columns, len(module.proj.weight))

        return forward.position_table(mode, table)

    def prepare(self, call: Call, forward: Forward, mode: Mode) -> Call:
        if call.get("image_rotary_emb") is None:
            return call
        cos, sin = call["image_rotary_emb"]
        rotary = real_rotary_centres(cos, sin, forward.grid, mode.patch_scale)
        return call | {"image_rotary_emb": rotary}

    def default_size(self, model: Model) -> tuple[Triple, int]:
        config, p = model.config, model.config.patch_size
        if config.patch_size_t:  # 1.5 stores the size of its largest table, not of its videos
            return (11, 48, 85), config.max_text_seq_length
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        grid = frames, config.sample_height // p, config.sample_width // p
        return grid, config.max_text_seq_length

    def picture_macs(self, model: Model, text_tokens: int) -> int:
        conditioning = linear_macs(model, r"^(time_embedding|ofs_embedding|norm_out)\.")
        return conditioning + text_tokens * linear_macs(model.patch_embed.text_proj)
