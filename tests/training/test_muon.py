"""Muon's steps are orthogonal, of AdamW's size, and those of torch's own optimiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ditdial.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_orthogonal(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    found = orthogonal(x)
    values = torch.linalg.svdvals(found)
    assert found.dtype == x.dtype
    assert values.min() > 0.6
    assert values.max() < 1.3
    U, _, Vh = torch.linalg.svd(x, full_matrices=False)
    diagonal = U.T @ found @ Vh.T  # the same singular vectors
    torch.testing.assert_close(diagonal, torch.diag(diagonal.diagonal()), rtol=0, atol=1e-12)


def test_scale_does_not_matter_and_zero_stays():
    x = torch.randn(8, 8)
    torch.testing.assert_close(orthogonal(x), orthogonal(1000 * x))
    assert not orthogonal(torch.zeros(8, 8)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it since 2.9")
def test_steps_are_those_of_torch():
    torch.manual_seed(0)
    start = torch.randn(32, 16)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        Muon([ours], 0.02, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(10):
        gradient = torch.randn_like(start)
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    moved, apart = (theirs - start).norm(), (ours - theirs).norm()
    assert apart < 0.02 * moved  # theirs rounds to bfloat16
    mine, other = (x.state_dict()["state"][0] for x in optimizers)
    assert mine.keys() == other.keys()
    torch.testing.assert_close(mine["momentum_buffer"], other["momentum_buffer"])


def test_weights_without_gradient_stay():
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([weight], 0.1, weight_decay=0.5)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(weight, torch.ones(4, 4))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4,\); legal: \(M, N\)"):
        Muon([nn.Parameter(torch.ones(4))], 0.1)
