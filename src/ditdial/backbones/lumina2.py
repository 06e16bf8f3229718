"""`Lumina2Transformer2DModel` (Lumina-Image 2.0, 2503.21758): one sequence, joined row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ditdial.backbones.arguments import Arguments, Call
from ditdial.backbones.base import Model
from ditdial.backbones.forward import Forward, Project
from ditdial.backbones.layers import attention
from ditdial.backbones.patches import Patches
from ditdial.backbones.refined import RefinedBackbone, refined_lists
from ditdial.backbones.sizes import pair
from ditdial.backbones.times import Times
from ditdial.cost.linears import linear_macs
from ditdial.cost.shape import TransformerShape
from ditdial.ops.patching import Triple, coarse_grid
from ditdial.ops.positions import rotary_centres
from ditdial.plan.mode import Mode

ADAPTED = (*attention("attn"), *(f"feed_forward.linear_{i}" for i in (1, 2, 3)))


class Lumina2Times(Times):
    """The pipeline takes the channels of its latent for a number of tokens."""

    def set_timesteps(self, scheduler: Any, steps: int, grid: Triple, pipe: Any) -> None:
        """Timesteps of a run of a latent with this base grid, as the pipeline asks."""
        channels = 16 if pipe is None else pipe.transformer.config.in_channels
        super().set_timesteps(scheduler, steps, (1, 1, channels), pipe)


class Lumina2Backbone(RefinedBackbone):
    """Refiners of text and of picture, then one sequence of both without the text's padding.

    The rotary module also cuts the latent into patches and tells the rows' lengths. The pipeline
    calls twice per step with the same latent and opens no `cache_context`.
    """

    model_class = "Lumina2Transformer2DModel"
    patches = Patches(embed="x_embedder", output="norm_out.linear_2", embed_layout="thwC")
    arguments = Arguments(
        condition=("encoder_hidden_states", "encoder_attention_mask"), conditional_first=None
    )
    times = Lumina2Times(scale=1.0, rises=True, own_sigmas=True)
    rotary = "rope_embedder"
    facts = (
        "num_layers",
        "num_refiner_layers",
        "num_attention_heads",
        "num_kv_heads",
        "hidden_size",
        "patch_size",
        "in_channels",
        "out_channels",
        "cap_feat_dim",
    )
    block_lists = refined_lists("attn", r"\.norm1\.linear")
    once = r"timestep_embedder|norm_out\.linear_1"
    prompt = r"^context_refiner|caption_embedder"
    low_rank = (("noise_refiner", ADAPTED), ("layers", ADAPTED))

    def phases(
        self, module: Model, forward: Forward, mode: Mode, stock: Callable[..., Any], args: tuple
    ) -> Any:
        (latent, mask), p = args, module.patch_size
        vectors, text, table, _, lengths, _ = stock(latent, mask)
        coarse = coarse_grid(forward.grid, mode.patch_scale)
        whole = tuple([n * k for n, k in zip(coarse, mode.patch_scale, strict=True)])
        if whole != forward.grid:  # groups at the border reach beyond it
            sides = whole[1] * p, whole[2] * p
            blank = latent.new_empty(1, 1, 1, 1).expand(*latent.shape[:2], *sides)
            table = stock(blank, mask)[2]
        table = table.transpose(0, 1).unflatten(0, whole)
        image = rotary_centres(table, mode.patch_scale).flatten(0, 2).transpose(0, 1)
        joint = [torch.cat([a[:n], b]) for a, b, n in zip(text, image, lengths, strict=True)]
        totals = [len(phases) for phases in joint]
        forward.lengths = lengths, totals
        return vectors, text, image, pad_sequence(joint, batch_first=True), lengths, totals

    def base_vectors(
        self,
        forward: Forward,
        mode: Mode,
        stock: Callable[[Tensor], Tensor],
        hidden: Tensor,
        project: Project,
    ) -> Tensor:
        assert forward.lengths is not None
        (texts, totals), tokens = forward.lengths, forward.tokens(mode)
        image = torch.stack([x[n : n + tokens] for x, n in zip(hidden, texts, strict=True)])
        vectors = super().base_vectors(forward, mode, stock, image, project)
        base = vectors.shape[1]
        joint = F.pad(stock(hidden[:, : max(texts)]), (0, 0, 0, base))
        for row, text in enumerate(texts):
            joint[row, text : text + base] = vectors[row]
            # The stock un-patchify reads this very list, which so far counts coarse tokens.
            totals[row] = text + base
        return joint

    def default_size(self, model: Model) -> tuple[Triple, int]:
        return (1, *pair(model.config.sample_size, model.config.patch_size)), 256

    def size(self, model: Model, call: Call) -> tuple[Any, ...]:
        longest = int(call["encoder_attention_mask"].sum(dim=1).max())
        return self.grid(model, call), longest, self.text_tokens(call)

    def shape(
        self, model: Model, grid: Triple, text_tokens: int, padded: int | None = None
    ) -> TransformerShape:
        # The text's refiner goes through its padding; the last layer projects the text as well.
        shape = super().shape(model, grid, padded or text_tokens)
        text = text_tokens * linear_macs(model.norm_out.linear_2)
        return replace(shape, text_tokens=text_tokens, picture_macs=shape.picture_macs + text)
