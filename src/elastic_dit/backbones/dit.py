"""`DiTTransformer2DModel` (DiT, 2212.09748): class-conditional, square, CFG in one batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from elastic_dit.backbones.base import Backbone, Branches, Call, Model
from elastic_dit.cost import TransformerShape
from elastic_dit.mode import Mode
from elastic_dit.ops.positions import group_centres, sincos_2d
from elastic_dit.routing import Router


class DiTBackbone(Backbone):
    """What is known of diffusers' DiT.

    Its time is t in 0..999. The null class is the last label, and the conditional rows come first.
    """

    model_class = "DiTTransformer2DModel"
    embed = "pos_embed"
    output = "proj_out_2"

    def grid(self, embed: Model, latent: Tensor) -> tuple[int, int]:
        return latent.shape[-2] // embed.patch_size, latent.shape[-1] // embed.patch_size

    def patch_vectors(self, embed: Model, latent: Tensor) -> Tensor:
        p = embed.patch_size
        B, C, height, width = latent.shape
        x = latent.reshape(B, C, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(B, height // p, width // p, C * p * p)

    def positions(self, embed: Model, router: Router, mode: Mode) -> Tensor:
        weight = embed.proj.weight
        key = (router.grid, mode, weight.device)
        if key not in router.tables:
            _, kh, kw = mode.patch_scale
            # Off its native size the stock table squeezes the grid into base_size units; so do the
            # centres.
            unit = [embed.base_size / side / embed.interpolation_scale for side in router.grid]
            rows = group_centres(router.grid[0], kh) * unit[0]
            columns = group_centres(router.grid[1], kw) * unit[1]
            table = sincos_2d(rows, columns, weight.shape[0])[None].float()
            router.tables[key] = table.to(weight.device)
        return router.tables[key]

    def embed_kernel(self, model: Model) -> tuple[Tensor, Tensor]:
        return model.pos_embed.proj.weight, model.pos_embed.proj.bias

    def output_rows(self, model: Model) -> tuple[Tensor, Tensor]:
        p, layer = model.config.patch_size, model.proj_out_2
        return layer.weight.unflatten(0, (p, p, -1)), layer.bias.unflatten(0, (p, p, -1))

    def load_patch(
        self, model: Model, embed: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]
    ) -> None:
        with torch.no_grad():
            model.pos_embed.proj.weight.copy_(embed[0])
            model.pos_embed.proj.bias.copy_(embed[1])
            model.proj_out_2.weight.copy_(output[0].flatten(0, 2))
            model.proj_out_2.bias.copy_(output[1].flatten())

    def low_rank_layers(self, model: Model) -> Iterator[tuple[str, nn.Linear]]:
        for i, block in enumerate(model.transformer_blocks):
            for name in (
                "attn1.to_q",
                "attn1.to_k",
                "attn1.to_v",
                "attn1.to_out.0",
                "ff.net.0.proj",
                "ff.net.2",
            ):
                yield f"transformer_blocks.{i}.{name}", block.get_submodule(name)

    def modulation_layers(self, model: Model) -> Iterator[nn.Module]:
        for block in model.transformer_blocks:
            yield block.norm1.linear
        yield model.proj_out_1

    def attention_layers(self, model: Model) -> Iterator[nn.Module]:
        for block in model.transformer_blocks:
            yield block.attn1

    def level_of(self, time: float) -> float:
        return time / 1000

    def level(self, call: Call) -> float:
        timestep = call.get("timestep")
        if timestep is None:
            raise ValueError(
                "timestep = None; an elastic model chooses its mode by the timestep, so give one"
            )
        times = torch.as_tensor(timestep).detach().reshape(-1).tolist()
        if min(times) != max(times):
            raise ValueError(
                f"timesteps of a batch go from {min(times)} to {max(times)}; legal: one per batch "
                "(set a mode yourself with handle.using(mode) to train on mixed ones)"
            )
        return self.level_of(times[0])

    def branches(self, model: Model, call: Call) -> Branches | None:
        labels = call.get("class_labels")
        count = call[self.sample_argument].shape[0]
        if labels is None or count % 2 or labels.numel() != count:
            return None
        null = model.config.num_embeds_ada_norm
        half = count // 2
        is_null = (labels.reshape(-1) == null).tolist()
        if all(is_null[half:]) and not any(is_null[:half]):
            return Branches(slice(0, half), slice(half, count))
        return None

    def give_condition(self, call: Call, condition: Call) -> Call:
        return {**call, "class_labels": condition["class_labels"]}

    def shape(self, model: Model) -> TransformerShape:
        config = model.config
        side = config.sample_size // config.patch_size
        area = config.patch_size**2
        return TransformerShape(
            width=model.inner_dim,
            depth=config.num_layers,
            grid=(side, side),
            patch_in=area * config.in_channels,
            patch_out=area * model.out_channels,
            conditioners=config.num_layers + 1,
        )

    def identity(self, model: Model) -> dict[str, Any]:
        config = model.config
        names = (
            "num_layers",
            "num_attention_heads",
            "attention_head_dim",
            "patch_size",
            "in_channels",
        )
        facts = {name: getattr(config, name) for name in names}
        return {
            "class": self.model_class,
            **facts,
            "out_channels": model.out_channels,
            "num_classes": config.num_embeds_ada_norm,
        }

    def wrap_output(self, sample: Tensor) -> Any:
        return Transformer2DModelOutput(sample=sample)

    def check(self, model: Model, modes: set[Mode]) -> None:
        side = model.config.sample_size // model.config.patch_size
        for mode in modes:
            t, kh, kw = mode.patch_scale
            if t != 1 or kh != kw:
                raise ValueError(
                    f"mode {mode.name!r}: {self.model_class} has square pictures; legal: patchK"
                )
            if side % kh:
                legal = [f"patch{k}" for k in range(2, side + 1) if side % k == 0]
                raise ValueError(
                    f"mode {mode.name!r} does not fit the {side}x{side} base grid of this model; "
                    f"legal: {', '.join(['full', *legal])}"
                )
