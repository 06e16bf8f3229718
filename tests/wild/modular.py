"""SD3 as modular blocks around tiny components: a guider, and one model call per branch."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.stable_diffusion_3 import modular_blocks_stable_diffusion_3
from tests.backbones.pipes import PIPES, embeddings
from tests.wild.pictures import noise, quiet
from torch import Tensor

STEPS = 8
SCALE = 4.0
GRID = (1, 8, 8)
TEXT_TOKENS = 14
EMBEDDINGS = {
    "prompt_embeds": embeddings(TEXT_TOKENS, 24),
    "negative_prompt_embeds": embeddings(TEXT_TOKENS, 24, seed=6),
    "pooled_prompt_embeds": embeddings(20, seed=7),
    "negative_pooled_prompt_embeds": embeddings(20, seed=8),
}


def blocks(**guider: Any) -> Any:
    """Blocks that denoise from given embeddings; ``start`` and ``stop`` are the guider's."""
    stock = PIPES["sd3"].pipe()
    pipe = modular_blocks_stable_diffusion_3.StableDiffusion3T2ICoreDenoiseStep().init_pipeline()
    guidance = ClassifierFreeGuidance(**{"guidance_scale": SCALE, **guider})
    pipe.update_components(
        transformer=stock.transformer, scheduler=stock.scheduler, guider=guidance
    )
    return quiet(pipe)


def draw(pipe: Any) -> Tensor:
    """Latents of a run; without an autoencoder, blocks take 8 pixels for one latent."""
    facts = {"num_inference_steps": STEPS, "generator": noise(1), "height": 128, "width": 128}
    return pipe(**EMBEDDINGS, **facts, output="latents")


def draw_in_one_batch(pipe: Any) -> Tensor:
    """The same run in the stock pipeline, which puts both branches into one call."""
    facts = {"num_inference_steps": STEPS, "generator": noise(1), "height": 16, "width": 16}
    return pipe(**EMBEDDINGS, **facts, guidance_scale=SCALE, output_type="latent").images


def assert_same_picture(found: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of two calls against one batch."""
    torch.testing.assert_close(found, expected, atol=1e-3 * expected.std().item(), rtol=1e-3)
