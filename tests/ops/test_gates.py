"""Gates open as often as their logits say, and let gradients pass."""

from __future__ import annotations

import pytest
import torch

from ditdial.ops.gates import gate, kept_tokens, logistic_noise, open_mask, open_tokens


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.1, 3.0])
def test_open_with_the_probability_of_the_logit(logit, temperature):
    """Whatever the temperature, which only scales the gradient."""
    logits = torch.full((40_000,), logit)
    noise = logistic_noise(logits, torch.Generator().manual_seed(0))
    rate = gate(logits, noise, temperature).mean()
    assert rate == pytest.approx(torch.sigmoid(torch.tensor(logit)).item(), abs=0.01)


def test_without_noise_open_above_zero():
    gates = gate(torch.tensor([-1.0, 0.0, 1e-3, 15.0]))
    assert gates.tolist() == [0.0, 0.0, 1.0, 1.0]  # exactly, whatever the rounding of the sigmoid


@pytest.mark.parametrize(("logit", "expected"), [(0.0, 0.05), (15.0, 0.009035), (35.0, 1.8203e-4)])
def test_gradient_of_the_surrogate(logit, expected):
    logits = torch.tensor([logit], requires_grad=True)
    gate(logits).sum().backward()
    assert logits.grad.item() == pytest.approx(expected, rel=1e-3)


def test_noise_repeats_with_its_generator():
    like = torch.zeros(3, 5)
    a, b = (logistic_noise(like, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b)
    assert logistic_noise(like, None) is None


@pytest.mark.parametrize("tokens", [1, 7, 8, 64, 100])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
def test_a_fixed_number_of_tokens(tokens, share):
    logits = torch.randn(3, tokens, generator=torch.Generator().manual_seed(0))
    count = kept_tokens(tokens, share)
    assert min(tokens, round(tokens * share)) <= count <= tokens
    assert count == tokens or count % 8 == 0
    mask = open_mask(logits, share)
    assert mask.sum(1).tolist() == [count] * 3
    for row, kept in zip(logits, mask.bool(), strict=True):
        assert count == tokens or row[kept].min() > row[~kept].max()


def test_places_and_mask_agree():
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    assert open_mask(logits).flatten().nonzero()[:, 0].tolist() == open_tokens(logits).tolist()
    assert open_mask(logits).tolist() == (logits > 0).float().tolist()
