"""`FluxTransformer2DModel` (FLUX.1): tokens packed by the pipeline, positions given as ids."""

from __future__ import annotations

import math

import torch

from elastic_dit.backbones.base import Backbone, Call, Model, linear_macs
from elastic_dit.cost import Attention, TransformerShape
from elastic_dit.mode import Mode
from elastic_dit.ops.patching import Triple
from elastic_dit.ops.positions import group_centres
from elastic_dit.routing import Router

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT = r"\.(attn\.(add_|to_add_out)|ff_context)"
MODULATION = r"\.norm[^.]*\.linear"


class FluxBackbone(Backbone):
    """Double blocks, then single blocks over text and picture; two calls per step with true CFG."""

    model_class = "FluxTransformer2DModel"
    embed = "x_embedder"
    output = "proj_out"
    condition = ("encoder_hidden_states", "pooled_projections", "txt_ids")
    facts = (
        "num_layers",
        "num_single_layers",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "joint_attention_dim",
        "guidance_embeds",
    )
    residuals = ("controlnet_block_samples", "controlnet_single_block_samples")
    embed_layout = output_layout = "Cthw"
    conditional_first = None
    time_scale = 1.0
    own_sigmas = True
    low_rank = (
        ("transformer_blocks", (*ATTENTION, "attn.to_out.0", "ff.net.0.proj", "ff.net.2")),
        ("single_transformer_blocks", (*ATTENTION, "proj_mlp", "proj_out")),
    )

    def patch(self, model: Model) -> Triple:
        return 1, 2, 2

    def grid(self, model: Model, call: Call) -> Triple:
        return grid_of_ids(call["img_ids"])

    def prepare(self, call: Call, router: Router, mode: Mode) -> Call:
        return call | {"img_ids": centre_ids(call["img_ids"], router.grid, mode)}

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (1, 64, 64), 512

    def shape(self, model: Model, grid: Triple, text_tokens: int) -> TransformerShape:
        config, d = model.config, model.inner_dim
        double, single = model.transformer_blocks, model.single_transformer_blocks
        both = linear_macs(single, but=MODULATION)
        modulation = linear_macs(double, MODULATION) + linear_macs(single, MODULATION)
        conditioning = linear_macs(model.time_text_embed) + linear_macs(model.norm_out)
        return TransformerShape(
            width=d,
            grid=grid,
            patch_in=config.in_channels,
            patch_out=model.proj_out.out_features,
            token_macs=linear_macs(double, but=f"{TEXT}|{MODULATION}") + both,
            attention=(Attention(config.num_layers + config.num_single_layers, d, "joint"),),
            text_tokens=text_tokens,
            text_macs=linear_macs(double, TEXT) + both,
            picture_macs=modulation
            + conditioning
            + text_tokens * linear_macs(model, "^context_embedder$"),
            adapted=self.adapted_macs(model),
            adapted_text=self.adapted_macs(model, "^single"),
        )


def grid_of_ids(ids: torch.Tensor) -> Triple:
    """Base grid of position ids ``(N, 3)``: ``(_, row, column)`` of each token, row-major.

    Raises:
        ValueError: the ids are not one whole grid (more pictures in one sequence, say).
    """
    ids = ids[0] if ids.ndim == 3 else ids
    if ids.is_meta:  # no numbers to read: counting costs only
        side = math.isqrt(len(ids))
        return 1, side, len(ids) // side
    first, last = ids[0, -2:].tolist(), ids[-1, -2:].tolist()
    height, width = (int(b - a) + 1 for a, b in zip(first, last, strict=True))
    if height * width != len(ids):
        raise ValueError(
            f"img_ids name {len(ids)} tokens from {first} to {last}, which is no single grid; "
            "legal: one picture per sequence"
        )
    return 1, height, width


def centre_ids(ids: torch.Tensor, grid: Triple, mode: Mode) -> torch.Tensor:
    """Position ids of the centres of a mode's groups."""
    flat = ids[0] if ids.ndim == 3 else ids
    _, kh, kw = mode.patch_scale
    rows = group_centres(grid[1], kh, flat.device).to(flat) + flat[0, -2]
    columns = group_centres(grid[2], kw, flat.device).to(flat) + flat[0, -1]
    rest = flat[0, :-2].expand(len(rows) * len(columns), -1)
    places = torch.cartesian_prod(rows, columns)
    return torch.cat([rest, places], dim=1)
