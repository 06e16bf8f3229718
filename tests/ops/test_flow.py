"""Flow maths: unit variance, velocity from the prediction, levels of every stratum."""

from __future__ import annotations

import torch

from ditdial.ops.flow import (
    network_input_and_target,
    path_norm,
    stratified_levels,
    velocity,
)

LEVELS = torch.tensor([0.0, 0.1, 0.5, 0.8, 1.0])


def test_velocity_of_the_true_target_is_noise_minus_data():
    data, noise = torch.randn(2, 5, 1000)
    level = LEVELS[:, None]
    x, target = network_input_and_target(data, noise, level)
    torch.testing.assert_close(velocity(x, target, level), noise - data, atol=1e-5, rtol=1e-5)
    path = (1 - level) * data + level * noise
    torch.testing.assert_close(x * path_norm(level), path, atol=1e-6, rtol=1e-5)


def test_input_and_target_have_unit_variance_and_are_uncorrelated():
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 5, 100_000, generator=generator)
    x, target = network_input_and_target(data, noise, LEVELS[:, None])
    torch.testing.assert_close(x.var(1), torch.ones(5), atol=0.02, rtol=0)
    torch.testing.assert_close(target.var(1), torch.ones(5), atol=0.02, rtol=0)
    torch.testing.assert_close((x * target).mean(1), torch.zeros(5), atol=0.02, rtol=0)


def test_one_level_from_each_stratum():
    levels = stratified_levels(64, torch.Generator().manual_seed(0), mean=0.3, std=1.2)
    uniform = torch.special.ndtr((torch.logit(levels.double()) - 0.3) / 1.2)
    assert (uniform.sort().values * 64).floor().tolist() == list(range(64))
    assert not torch.equal(levels, levels.sort().values)
    again = stratified_levels(64, torch.Generator().manual_seed(0), mean=0.3, std=1.2)
    assert torch.equal(levels, again)
