"""`ZImageTransformer2DModel` (Z-Image, 2511.22699): lists of pictures, one sequence with the text.

The model cuts patches and makes positions in methods of its own. It fills each picture and each
text up to a multiple of 32 tokens; the filler takes part in everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor

from ditdial.backbones.arguments import Arguments, Call
from ditdial.backbones.base import Model, Rewired
from ditdial.backbones.forward import Embed, Forward, Project
from ditdial.backbones.layers import attention
from ditdial.backbones.patches import Patches
from ditdial.backbones.refined import RefinedBackbone, refined_lists
from ditdial.backbones.times import Times
from ditdial.cost.shape import TransformerShape
from ditdial.ops.patching import Triple, coarse_grid, group, ungroup
from ditdial.plan.mode import Mode

ADAPTED = (*attention("attention"), "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
PLAIN = {"all_patch_size": (2,), "all_f_patch_size": (1,), "siglip_feat_dim": None}
"""One patch size, and no pictures beside the one to make."""


def grouped_patches(
    model: Model, forward: Forward, stock: Rewired, *args: Any
) -> tuple[Tensor, Triple, Triple]:
    """Vectors of a picture's tokens, its size, and the grid that positions are counted on."""
    vectors, size, grid = stock(*args)
    scale = forward.mode.patch_scale
    return group(vectors.unflatten(0, grid)[None], scale)[0], size, coarse_grid(grid, scale)


def centred_phases(model: Model, forward: Forward, stock: Rewired, *args: Any) -> tuple[Any, ...]:
    """A sequence and its phases, which of a picture are those of the groups' centres.

    A centre lies on a base token or halfway between two, whose phases are added and brought back to
    length one. Fillers stand at 0.
    """
    _, ids, fillers, pad_token, *_ = args
    tokens, phases, *rest = stock(*args)
    if pad_token is not model.x_pad_token:
        return tokens, phases, *rest
    counted, filler = torch.cat(ids), torch.cat(fillers)[:, None]
    scale = counted.new_tensor(forward.mode.patch_scale)
    before, after = (
        model.rope_embedder(counted.where(filler, counted * scale + half))
        for half in ((scale - 1) // 2, scale // 2)
    )
    centres = (before + after) / (before + after).abs()
    return tokens, centres.view_as(phases), *rest


def filled(tokens: int) -> int:
    """Tokens and the filler up to a multiple."""
    return tokens + -tokens % SEQ_MULTI_OF


@dataclass(frozen=True, kw_only=True)
class FilledShape(TransformerShape):
    """Blocks go through the filler too, and in full mode so do the first layer and the last."""

    def tokens(self, mode: Mode) -> int:
        return filled(super().tokens(mode))

    def seen(self, mode: Mode) -> Triple:
        return 1, 1, self.tokens(mode)

    def patch_macs(self, mode: Mode) -> float:
        if not mode.has_base_patch:
            return super().patch_macs(mode)
        text = (
            self.text_tokens * self.patches.out * self.patches.width
        )  # the last layer takes it too
        return self.tokens(mode) * self.patches.macs + text


class ZImageTimes(Times):
    """The pipeline gives sigmas of single precision."""

    def sigmas(self, steps: int) -> Any:
        """Noise levels that the pipeline gives its scheduler."""
        return torch.linspace(1.0, 1 / steps, steps).tolist()


class ZImageBackbone(RefinedBackbone):
    """Refiners of picture and of text, then one sequence of both; conditional rows first.

    All pictures of a call have one size. Omni models, which take more of them, are refused.
    """

    model_class = "ZImageTransformer2DModel"
    patches = Patches(
        embed="all_x_embedder.2-1",
        output="all_final_layer.2-1.linear",
        embed_layout="thwC",
        fixed=(1, 2, 2),
    )
    arguments = Arguments(
        sample="x",
        lists=("x", "cap_feats"),
        condition=("cap_feats",),
        residuals=("controlnet_block_samples",),
        conditional_first=True,
    )
    times = ZImageTimes(argument="t", scale=1.0, rises=True, own_sigmas=True)
    rewired = (("_patchify_image", grouped_patches), ("_prepare_sequence", centred_phases))
    facts = ("dim", "n_layers", "n_refiner_layers", "n_heads", "in_channels", "cap_feat_dim")
    shape_class = FilledShape
    block_lists = refined_lists("attention", "adaLN_modulation")
    once = r"^t_embedder|^all_final_layer.*adaLN_modulation"
    prompt = "^(cap_embedder|context_refiner)"
    low_rank = (("noise_refiner", ADAPTED), ("layers", ADAPTED))

    def check(self, model: Model, modes: set[Mode]) -> None:
        super().check(model, modes)
        for name, legal in PLAIN.items():
            value = getattr(model.config, name)
            if (tuple(value) if isinstance(value, list) else value) != legal:
                raise ValueError(f"{name} = {value}; legal: {legal}")

    def text_tokens(self, call: Call) -> int:
        return max(map(len, call["cap_feats"]))

    def tokens(
        self, module: Model, forward: Forward, mode: Mode, latent: Tensor, embed: Embed
    ) -> Tensor:
        count = forward.tokens(mode)
        rows = latent.unflatten(0, (-1, filled(count)))  # one after the other
        vectors = ungroup(rows[:, :count], forward.grid, mode.patch_scale)
        tokens = embed(vectors.unflatten(1, forward.grid))
        return F.pad(tokens, (0, 0, 0, rows.shape[1] - count)).flatten(0, 1)

    def base_vectors(
        self, forward: Forward, mode: Mode, stock: Rewired, hidden: Tensor, project: Project
    ) -> Tensor:
        own = hidden[:, : forward.tokens(mode)]
        return super().base_vectors(forward, mode, stock, own, project)

    def averaged(self, residual: Tensor, forward: Forward, mode: Mode) -> Tensor:
        base, coarse = math.prod(forward.grid), forward.tokens(mode)
        means = super().averaged(residual[:, :base], forward, mode)
        # The filler is no part of the picture; the text stands behind it.
        means = F.pad(means, (0, 0, 0, filled(coarse) - coarse))
        return torch.cat([means, residual[:, filled(base) :]], dim=1)

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (1, 64, 64), 512

    def shape(self, model: Model, grid: Triple, text_tokens: int) -> TransformerShape:
        return super().shape(model, grid, filled(text_tokens))
