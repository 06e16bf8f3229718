"""`Flux2Transformer2DModel` (FLUX.2): FLUX with shared modulation and ids of four axes."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModelOutput
from torch import Tensor

from elastic_dit.backbones.base import Call, Model, linear_macs, with_other_pictures
from elastic_dit.backbones.flux import ATTENTION, TEXT, FluxBackbone
from elastic_dit.cost import Attention, TransformerShape
from elastic_dit.mode import Mode
from elastic_dit.ops.patching import Triple
from elastic_dit.ops.positions import group_centres
from elastic_dit.routing import Router


class Flux2Backbone(FluxBackbone):
    """Ids are whole numbers ``(time, row, column, word)``; reference pictures have other times.

    The guided pipeline (klein) calls twice per step; FLUX.2 dev is distilled and opens no
    `cache_context`. Sequences with reference pictures run in full mode.
    """

    model_class = "Flux2Transformer2DModel"
    condition = ("encoder_hidden_states", "txt_ids")
    low_rank = (
        ("transformer_blocks", (*ATTENTION, "attn.to_out.0", "ff.linear_in", "ff.linear_out")),
        ("single_transformer_blocks", ("attn.to_qkv_mlp_proj", "attn.to_out")),
    )

    def grid(self, model: Model, call: Call) -> Triple:
        # References whose keys and values are kept stand before the picture, others behind it.
        return first_grid(call["img_ids"], call.get("num_ref_tokens", 0))

    def prepare(self, call: Call, router: Router, mode: Mode) -> Call:
        return call | {"img_ids": centre_ids(call["img_ids"], router.grid, mode)}

    def check_call(self, call: Call, mode: Mode) -> None:
        super().check_call(call, mode)
        if call.get("kv_cache_mode") is not None:
            raise ValueError(
                f"kv_cache_mode = {call['kv_cache_mode']!r} adds the tokens of reference pictures, "
                f"and mode {mode.name!r} takes none; legal with them: full mode"
            )
        tokens, own = call["hidden_states"].shape[1], math.prod(first_grid(call["img_ids"]))
        if tokens != own:
            raise ValueError(
                f"img_ids name {tokens} tokens, {own} of them of the first picture, and mode "
                f"{mode.name!r} takes no others; legal with reference pictures: full mode"
            )

    def size(self, model: Model, call: Call) -> tuple[Any, ...]:
        grid, text_tokens = super().size(model, call)
        return grid, text_tokens, call["hidden_states"].shape[1] - math.prod(grid)

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

    def wrap_output(self, sample: Tensor) -> Any:
        return Flux2Transformer2DModelOutput(sample=sample)


def first_grid(ids: Tensor, skip: int = 0) -> Triple:
    """Base grid of the first picture in position ids ``(N, 4)``, ``skip`` tokens aside.

    Raises:
        ValueError: its ids are not one whole grid.
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
            "is no whole grid; legal: each picture row by row, at a time of its own"
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
