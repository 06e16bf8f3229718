"""Tiny models of every supported class with random weights, and calls for them.

A case gives the constructor's arguments, the arguments of a call at a base grid, and what a picture
of that grid may be cut into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """One class.

    Args:
        config: of the constructor.
        call: ``call(count, grid, time)`` -> arguments of a model call for ``count`` pictures.
        grids: base grids to try, ragged ones included.
        scales: coarse scales to try.
        guided: ``guided(call)`` -> a call with both branches in one batch, or None.
        counts_on_meta: the stock forward reads no numbers, so that it runs on the meta device.
        sample: argument that holds the latent.
    """

    model_class: str
    config: dict[str, Any]
    call: Callable[[int, Grid, float], dict[str, Any]]
    grids: tuple[Grid, ...] = ((1, 8, 8), (1, 6, 10), (1, 7, 5))
    scales: tuple[Any, ...] = (2, 4)
    batched: bool = True
    counts_on_meta: bool = True
    sample: str = "hidden_states"

    def model(self) -> Any:
        """A model with noise on every parameter, the same each time."""
        torch.manual_seed(0)
        model = getattr(diffusers, self.model_class)(**self.config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.05 * noise.to(parameter))
        return model

    def guided(self, count: int, grid: Grid, time: float) -> dict[str, Any]:
        """A call of ``2 count`` rows as the class's pipeline makes it."""
        call = self.call(2 * count, grid, time)
        latent = call[self.sample]
        half = latent[:count]
        call[self.sample] = half * 2 if isinstance(half, list) else torch.cat([half] * 2)
        if "class_labels" in call:
            call["class_labels"][count:] = 10
        return call


def noise(*shape: int, seed: int = 7) -> Tensor:
    """Normal numbers, the same for a row whatever the batch is."""
    rows = [
        torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed + 100 * row))
        for row in range(shape[0])
    ]
    return torch.stack(rows)


def dit_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    return {
        "hidden_states": noise(count, 4, grid[1] * 2, grid[2] * 2),
        "timestep": torch.full((count,), time),
        "class_labels": torch.arange(1, count + 1),
    }


def pixart_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    mask = torch.ones(count, 6, dtype=torch.long)
    mask[:, 4:] = 0
    return {
        "hidden_states": noise(count, 4, grid[1] * 2, grid[2] * 2),
        "encoder_hidden_states": noise(count, 6, 24, seed=8),
        "timestep": torch.full((count,), time),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {
            "resolution": torch.tensor([[16.0, 16.0]]).repeat(count, 1),
            "aspect_ratio": torch.tensor([[1.0]]).repeat(count, 1),
        },
    }


def sd3_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    return {
        "hidden_states": noise(count, 4, grid[1] * 2, grid[2] * 2),
        "encoder_hidden_states": noise(count, 5, 24, seed=8),
        "pooled_projections": noise(count, 20, seed=9),
        "timestep": torch.full((count,), time),
    }


def latte_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    return {
        "hidden_states": noise(count, 4, grid[0], grid[1] * 2, grid[2] * 2),
        "encoder_hidden_states": noise(count, 6, 24, seed=8),
        "timestep": torch.full((count,), time),
    }


def flux_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(grid[1]), torch.arange(grid[2]), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    return {
        "hidden_states": noise(count, grid[1] * grid[2], 16),
        "encoder_hidden_states": noise(count, 5, 24, seed=8),
        "pooled_projections": noise(count, 20, seed=9),
        "timestep": torch.full((count,), time / 1000),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.full((count,), 3.5),
    }


def wan_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    return {
        "hidden_states": noise(count, 4, grid[0], grid[1] * 2, grid[2] * 2),
        "encoder_hidden_states": noise(count, 5, 24, seed=8),
        "timestep": torch.full((count,), time),
    }


def wan_token_times(count: int, grid: Grid, time: float) -> dict[str, Any]:
    """Wan 2.2 5B: the first frame is given, so its tokens have time 0."""
    call = wan_call(count, grid, time)
    times = torch.full((count, grid[0], grid[1] * grid[2]), time)
    times[:, 0] = 0
    return call | {"timestep": times.flatten(1)}


def hunyuan_video_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    mask = torch.ones(count, 6, dtype=torch.long)
    mask[:, 4:] = 0
    return {
        "hidden_states": noise(count, 4, grid[0], grid[1] * 2, grid[2] * 2),
        "encoder_hidden_states": noise(count, 6, 24, seed=8),
        "encoder_attention_mask": mask,
        "pooled_projections": noise(count, 20, seed=9),
        "timestep": torch.full((count,), time),
        "guidance": torch.full((count,), 6000.0),
    }


def qwenimage_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    mask = torch.ones(count, 5, dtype=torch.long)
    mask[0, 3:] = 0
    return {
        "hidden_states": noise(count, grid[1] * grid[2], 16),
        "encoder_hidden_states": noise(count, 5, 24, seed=8),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((count,), time / 1000),
        "img_shapes": [[grid]],  # of every row
    }


def flux2_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    one = torch.arange(1)
    ids = torch.cartesian_prod(one, torch.arange(grid[1]), torch.arange(grid[2]), one)
    words = torch.cartesian_prod(one, one, one, torch.arange(5))
    return {
        "hidden_states": noise(count, grid[1] * grid[2], 16),
        "encoder_hidden_states": noise(count, 5, 24, seed=8),
        "timestep": torch.full((count,), time / 1000),
        "img_ids": ids.expand(count, -1, -1),
        "txt_ids": words.expand(count, -1, -1),
        "guidance": torch.full((count,), 3.5),
    }


def chroma_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    call = flux_call(count, grid, time)
    del call["pooled_projections"], call["guidance"]
    mask = torch.ones(count, 5 + grid[1] * grid[2])
    mask[0, 3:5] = 0
    return call | {"attention_mask": mask}


def auraflow_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    return {
        "hidden_states": noise(count, 4, grid[1] * 2, grid[2] * 2),
        "encoder_hidden_states": noise(count, 5, 24, seed=8),
        "timestep": torch.full((count,), time / 1000),
    }


def lumina2_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    """Times run from 0, noise, to 1; the first row has a shorter prompt."""
    mask = torch.ones(count, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {
        "hidden_states": noise(count, 4, grid[1] * 2, grid[2] * 2),
        "encoder_hidden_states": noise(count, 6, 24, seed=8),
        "encoder_attention_mask": mask,
        "timestep": torch.full((count,), 1 - time / 1000),
    }


def sana_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    mask = torch.ones(count, 6, dtype=torch.long)
    mask[:, 4:] = 0
    return {
        "hidden_states": noise(count, 4, *grid[1:]),
        "encoder_hidden_states": noise(count, 6, 24, seed=8),
        "encoder_attention_mask": mask,
        "timestep": torch.full((count,), time),
    }


def sana_sprint_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    call = sana_call(count, grid, time / 1000)
    return call | {"guidance": torch.full((count,), 0.45)}


def cogvideox_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    return {
        "hidden_states": noise(count, grid[0], 4, grid[1] * 2, grid[2] * 2),
        "encoder_hidden_states": noise(count, 5, 24, seed=8),
        "timestep": torch.full((count,), time),
    }


def cogvideox_rotary_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    """5B: rotary phases of the whole grid come from the pipeline."""
    phases = get_3d_rotary_pos_embed(16, ((0, 0), grid[1:]), grid[1:], grid[0])
    return cogvideox_call(count, grid, time) | {"image_rotary_emb": phases}


def cogvideox_15_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    """1.5: two frames per token; image-to-video has an offset embedding."""
    call = cogvideox_rotary_call(count, grid, time)
    latent = noise(count, grid[0] * 2, 4, grid[1] * 2, grid[2] * 2)
    return call | {"hidden_states": latent, "ofs": torch.full((1,), 2.0)}


def ltx_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    mask = torch.ones(count, 6, dtype=torch.long)
    mask[:, 4:] = 0
    return {
        "hidden_states": noise(count, grid[0] * grid[1] * grid[2], 8),
        "encoder_hidden_states": noise(count, 6, 24, seed=8),
        "encoder_attention_mask": mask,
        "timestep": torch.full((count,), time),
        "num_frames": grid[0],
        "height": grid[1],
        "width": grid[2],
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def ltx_coordinates_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    """0.9.5 on: seconds and pixels of every token; the first frame is given and has time 0."""
    frames = (torch.arange(grid[0]) * 8 - 7).clamp(min=0) / 25
    places = torch.cartesian_prod(frames, *(torch.arange(side) * 32.0 for side in grid[1:]))
    times = torch.full((count, grid[0], grid[1] * grid[2]), time)
    times[:, 0] = 0
    call = ltx_call(count, grid, time)
    del call["rope_interpolation_scale"]
    return call | {"timestep": times.flatten(1), "video_coords": places.T.repeat(count, 1, 1)}


def cogview4_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    sizes = torch.tensor([[64.0, 64.0]]).repeat(count, 1)
    return {
        "hidden_states": noise(count, 4, grid[1] * 2, grid[2] * 2),
        "encoder_hidden_states": noise(count, 5, 24, seed=8),
        "timestep": torch.full((count,), time),
        "original_size": sizes,
        "target_size": sizes,
        "crop_coords": torch.zeros(count, 2),
    }


def z_image_call(count: int, grid: Grid, time: float) -> dict[str, Any]:
    """Lists; times run from 0, noise, to 1; the first row has a shorter prompt."""
    text = noise(count, 40, 24, seed=8)
    return {
        "x": list(noise(count, 4, grid[0], grid[1] * 2, grid[2] * 2)),
        "t": torch.full((count,), 1 - time / 1000),
        "cap_feats": [row[: 40 if index else 6] for index, row in enumerate(text)],
    }


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
WAN = {
    **HEADS,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 40,
    "rope_max_seq_len": 32,
}
VIDEO_SCALES = (2, 4, (2, 1, 1), (2, 2, 2))
VIDEO = ((4, 8, 8), (3, 7, 6), (5, 4, 9))
LUMINA2 = {
    "sample_size": 16,
    "in_channels": 4,
    "hidden_size": 32,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 8,
    "axes_dim_rope": (4, 6, 6),
    "axes_lens": (16, 20, 20),
    "cap_feat_dim": 24,
}
QWENIMAGE = {
    **HEADS,
    "in_channels": 16,
    "out_channels": 4,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
SANA = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 8,
}
COGVIDEOX = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 20,
    "text_embed_dim": 24,
    "sample_width": 16,
    "sample_height": 16,
    "sample_frames": 13,
    "max_text_seq_length": 5,
}
LTX = {
    **HEADS,
    "in_channels": 8,
    "out_channels": 8,
    "cross_attention_dim": 32,
    "caption_channels": 24,
}

CASES = {
    "dit": Case(
        "DiTTransformer2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 16,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
        },
        dit_call,
        grids=((1, 8, 8), (1, 7, 7), (1, 4, 4)),
    ),
    "pixart": Case(
        "PixArtTransformer2DModel",
        {
            **HEADS,
            "attention_head_dim": 24,
            "cross_attention_dim": 48,
            "caption_channels": 24,
            "sample_size": 16,
            "use_additional_conditions": True,
        },
        pixart_call,
    ),
    "sd3": Case(
        "SD3Transformer2DModel",
        {
            **HEADS,
            "num_layers": 3,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 20,
            "pos_embed_max_size": 12,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        sd3_call,
    ),
    "latte": Case(
        "LatteTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "sample_size": 16,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "attention_bias": True,
            "video_length": 3,
        },
        latte_call,
        grids=((3, 8, 8), (3, 7, 5)),
    ),
    "flux": Case(
        "FluxTransformer2DModel",
        {
            **HEADS,
            "in_channels": 16,
            "num_single_layers": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 20,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        flux_call,
        batched=False,
    ),
    "wan": Case(
        "WanTransformer3DModel",
        WAN,
        wan_call,
        grids=VIDEO,
        scales=(2, 4, (2, 1, 1), (2, 2, 2)),
        batched=False,
    ),
    "wan-token-times": Case(
        "WanTransformer3DModel",
        WAN,
        wan_token_times,
        grids=VIDEO,
        scales=(2, (1, 4, 4)),
        batched=False,
    ),
    "hunyuan-video": Case(
        "HunyuanVideoTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 24,
            "pooled_projection_dim": 20,
            "rope_axes_dim": (4, 6, 6),
        },
        hunyuan_video_call,
        grids=VIDEO,
        scales=VIDEO_SCALES,
        batched=False,
    ),
    "qwenimage": Case("QwenImageTransformer2DModel", QWENIMAGE, qwenimage_call, batched=False),
    "qwenimage-two-times": Case(
        "QwenImageTransformer2DModel",
        {**QWENIMAGE, "zero_cond_t": True},
        qwenimage_call,
        batched=False,
    ),
    "flux2": Case(
        "Flux2Transformer2DModel",
        {
            **HEADS,
            "in_channels": 16,
            "num_single_layers": 2,
            "joint_attention_dim": 24,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        flux2_call,
        batched=False,
    ),
    "chroma": Case(
        "ChromaTransformer2DModel",
        {
            **HEADS,
            "in_channels": 16,
            "num_single_layers": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 20,
            "approximator_layers": 2,
        },
        chroma_call,
        batched=False,
    ),
    "lumina2": Case(
        "Lumina2Transformer2DModel", LUMINA2, lumina2_call, batched=False, counts_on_meta=False
    ),
    "auraflow": Case(
        "AuraFlowTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "sample_size": 16,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 144,
        },
        auraflow_call,
    ),
    "sana": Case("SanaTransformer2DModel", SANA, sana_call),
    "sana-sprint": Case(
        "SanaTransformer2DModel",
        {
            **SANA,
            "guidance_embeds": True,
            "interpolation_scale": 1,
            "qk_norm": "rms_norm_across_heads",
        },
        sana_sprint_call,
    ),
    "cogvideox-2b": Case(
        "CogVideoXTransformer3DModel",
        COGVIDEOX,
        cogvideox_call,
        grids=VIDEO,
        scales=VIDEO_SCALES,
    ),
    "cogvideox-5b": Case(
        "CogVideoXTransformer3DModel",
        {**COGVIDEOX, "use_rotary_positional_embeddings": True},
        cogvideox_rotary_call,
        grids=VIDEO,
        scales=VIDEO_SCALES,
    ),
    "cogvideox-5b-image": Case(
        "CogVideoXTransformer3DModel",
        {
            **COGVIDEOX,
            "use_rotary_positional_embeddings": True,
            "use_learned_positional_embeddings": True,
        },
        cogvideox_rotary_call,
        grids=(VIDEO[0], VIDEO[0]),
        scales=(2, (3, 1, 1)),
    ),
    "cogvideox-1.5": Case(
        "CogVideoXTransformer3DModel",
        {
            **COGVIDEOX,
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "ofs_embed_dim": 20,
        },
        cogvideox_15_call,
        grids=VIDEO,
        scales=VIDEO_SCALES,
    ),
    "ltx": Case("LTXVideoTransformer3DModel", LTX, ltx_call, grids=VIDEO, scales=VIDEO_SCALES),
    "ltx-coordinates": Case(
        "LTXVideoTransformer3DModel",
        LTX,
        ltx_coordinates_call,
        grids=VIDEO,
        scales=VIDEO_SCALES,
    ),
    "cogview4": Case(
        "CogView4Transformer2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 20,
            "condition_dim": 8,
            "sample_size": 16,
            "rope_axes_dim": (64, 64),
        },
        cogview4_call,
        batched=False,
    ),
    "z-image": Case(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 24,
            "axes_dims": (4, 6, 6),
            "axes_lens": (80, 20, 20),
        },
        z_image_call,
        sample="x",
    ),
}
