"""DiT embeds the same time in every block: its sinusoids are computed once per pass."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import embeddings
from tests.backbones.tiny import CASES
from tests.elastic_models import call_of

from ditdial import FULL, FlexiDiT, Mode, elastify


@pytest.mark.parametrize("mode", [FULL, Mode(2)], ids=str)
def test_sinusoids_are_computed_once_per_pass(monkeypatch, mode):
    model, seen = CASES["dit"].model(), []
    stock = embeddings.get_timestep_embedding

    def counted(timesteps, *args, **kwargs):
        seen.append(timesteps.tolist())
        return stock(timesteps, *args, **kwargs)

    handle = elastify(model, FlexiDiT(rank=2))
    monkeypatch.setattr(embeddings, "get_timestep_embedding", counted)
    with torch.no_grad(), handle.using(mode):
        model(**call_of("dit", time=500.0))
        model(**call_of("dit", time=250.0))
    assert [set(times) for times in seen] == [{500.0}, {250.0}]


def test_times_that_are_written_to_between_passes_are_new_ones():
    model = CASES["dit"].model()
    call = call_of("dit", time=500.0)
    other = call | {"timestep": call["timestep"] - 250}
    with torch.no_grad():
        expected = model(**other).sample
        handle = elastify(model, FlexiDiT(rank=2))
        with handle.disabled():
            model(**call)
            call["timestep"] -= 250
            assert torch.equal(model(**call).sample, expected)
