"""Latents to pixels as the pipelines do it, and back."""

from __future__ import annotations

import pytest
import torch
from tests.backbones.pipes import PIPES

from ditdial.evaluation.autoencoders import decoded, encoded, knows

NAMES = ("sd3", "chroma", "z-image", "wan", "flux")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_pixels_are_those_of_the_pipeline(name):
    case = PIPES[name]
    pipe = case.pipe()
    latents = case.draw(pipe)
    if latents.ndim == 3:  # two rows and columns to a token
        x = latents.unflatten(1, (8, 8)).unflatten(-1, (-1, 2, 2))
        latents = x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)[:, :, None]
    expected = case.draw(pipe, output_type="pt")
    found = decoded(pipe.vae, latents)
    if name == "wan":
        found = found.transpose(1, 2)
    elif found.ndim == 5:
        found = found[:, :, 0]
    torch.testing.assert_close(found / 2 + 0.5, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01


@pytest.mark.parametrize(("name", "shape"), [("sd3", (2, 3, 8, 6)), ("wan", (1, 3, 5, 16, 8))])
@torch.no_grad()
def test_the_way_back_undoes_the_pipelines_shift_and_scale(name, shape):
    vae = PIPES[name].pipe().vae
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = vae.encode(pixels).latent_dist.mode()
    expected = vae.decode(z, return_dict=False)[0].clamp(-1, 1)
    latents = encoded(vae, pixels)
    assert not torch.allclose(latents, z, atol=1e-2)
    torch.testing.assert_close(decoded(vae, latents), expected, atol=1e-5, rtol=0)


def test_frames_go_through_a_vae_of_pictures_one_by_one():
    vae = PIPES["sd3"].pipe().vae
    pixels = torch.rand(2, 3, 4, 8, 8)
    with torch.no_grad():
        found = encoded(vae, pixels)
        for frame in range(4):
            alone = encoded(vae, pixels[:, :, frame])
            torch.testing.assert_close(found[:, :, frame], alone, atol=1e-5, rtol=0)
    assert knows(vae)
    assert not knows(None)
