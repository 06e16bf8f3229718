"""`FluxTransformer2DModel` (FLUX.1): tokens packed by the pipeline, positions given as ids."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from elastic_dit.backbones.base import Backbone, Call, Model, linear_macs, with_other_pictures
from elastic_dit.cost import Attention, TransformerShape
from elastic_dit.mode import Mode
from elastic_dit.ops.patching import Triple
from elastic_dit.ops.positions import group_centres
from elastic_dit.routing import Router

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT = r"\.(attn\.(add_|to_add_out)|ff_context)"
MODULATION = r"\.norm[^.]*\.linear"


class FluxBackbone(Backbone):
    """Double blocks, then single blocks over text and picture; two calls per step with true CFG.

    Sequences with reference pictures (Kontext) run in full mode.
    """

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

    def __init__(self) -> None:
        self._read: tuple[weakref.ref[Tensor], Any, Triple] | None = None

    def grid(self, model: Model, call: Call) -> Triple:
        ids = call["img_ids"]
        seen = ids._version if not ids.is_inference() else None, self.references_before(call)
        if self._read is None or self._read[0]() is not ids or self._read[1] != seen:
            # Reading ids waits for the device; pipelines pass the same tensor at every step.
            self._read = weakref.ref(ids), seen, first_grid(ids, seen[1])
        return self._read[2]

    def references_before(self, call: Call) -> int:
        """Tokens of reference pictures that stand before the picture; others stand behind it."""
        return 0

    def check_call(self, call: Call, mode: Mode) -> None:
        super().check_call(call, mode)
        tokens, own = call["hidden_states"].shape[1], math.prod(self.grid(None, call))
        if tokens != own:
            raise ValueError(
                f"img_ids name {tokens} tokens, {own} of them of the first picture, and mode "
                f"{mode.name!r} takes no others; legal with reference pictures: full mode"
            )

    def size(self, model: Model, call: Call) -> tuple[Any, ...]:
        grid, text_tokens = super().size(model, call)
        return grid, text_tokens, call["hidden_states"].shape[1] - math.prod(grid)

    def prepare(self, call: Call, router: Router, mode: Mode) -> Call:
        return call | {"img_ids": centre_ids(call["img_ids"], router.grid, mode)}

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (1, 64, 64), 512

    def shape(
        self, model: Model, grid: Triple, text_tokens: int, others: int = 0
    ) -> TransformerShape:
        config, d = model.config, model.inner_dim
        double, single = model.transformer_blocks, model.single_transformer_blocks
        both = linear_macs(single, but=MODULATION)
        modulation = linear_macs(double, MODULATION) + linear_macs(single, MODULATION)
        conditioning = linear_macs(model.time_text_embed) + linear_macs(model.norm_out)
        shape = TransformerShape(
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
        return with_other_pictures(shape, others)


def first_grid(ids: Tensor, skip: int = 0) -> Triple:
    """Base grid of the first picture in position ids ``(N, 3 or 4)``, ``skip`` tokens aside.

    The second and third number of an id are row and column; the first tells pictures apart.

    Raises:
        ValueError: the first picture's ids are not one whole grid.
    """
    ids = (ids[0] if ids.ndim == 3 else ids)[skip:]
    if ids.is_meta:  # no numbers to read: counting costs only
        side = math.isqrt(len(ids))
        return 1, side, len(ids) // side
    ids = ids.cpu()
    ids = ids[ids[:, 0] == ids[0, 0]]
    height, width = (int(n) + 1 for n in ids[-1, 1:3] - ids[0, 1:3])
    if height * width != len(ids):
        raise ValueError(
            f"img_ids name {len(ids)} tokens up to row {height - 1} and column {width - 1}, which "
            "is no whole grid; legal: each picture row by row, under a number of its own"
        )
    return 1, height, width


def centre_ids(ids: Tensor, grid: Triple, mode: Mode) -> Tensor:
    """Position ids of the centres of a mode's groups; no longer whole numbers."""
    first = (ids[0] if ids.ndim == 3 else ids)[0].float()
    _, kh, kw = mode.patch_scale
    rows = group_centres(grid[1], kh, first.device).to(first) + first[1]
    columns = group_centres(grid[2], kw, first.device).to(first) + first[2]
    centres = first.repeat(len(rows) * len(columns), 1)
    centres[:, 1:3] = torch.cartesian_prod(rows, columns)
    return centres
