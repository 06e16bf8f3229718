"""Compiling an elastic model: one whole graph per mode, the same numbers as eager."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from tests.backbones.tiny import CASES
from tests.elastic_models import WEAK, run
from tests.elastic_models import elastic as elastic_of
from torch._dynamo.testing import CompileCounterWithBackend

from ditdial import DyDiT, Execution, FlexiDiT, Mode, PixelDiTPipeline, Schedule, elastify


@pytest.fixture(params=["lora", "merged", "shared"])
def elastic(request):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=1,
        num_layers=2,
        sample_size=32,
        patch_size=4,
        num_embeds_ada_norm=10,
    ).eval()
    recipe = "shared" if request.param == "shared" else "lora"
    handle = elastify(
        model, FlexiDiT(recipe=recipe, rank=4), execution=Execution(merge=request.param == "merged")
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return handle


def forward(handle, mode):
    x = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    times, labels = torch.full((4,), 500.0), torch.tensor([1, 2, 3, 4])
    with torch.no_grad(), handle.using(mode):
        return handle.model(x, timestep=times, class_labels=labels).sample


def test_one_graph_per_mode(elastic):
    modes = [Mode(1), Mode(2), Mode(4)]
    eager = [forward(elastic, mode) for mode in modes]
    counter = CompileCounterWithBackend("eager")
    elastic.model.compile(backend=counter, fullgraph=True)
    graphs = []
    for mode, expected in zip(modes * 2, eager * 2, strict=True):
        torch.testing.assert_close(forward(elastic, mode), expected)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 3, 3, 3, 3]


# Sides that stand for something else too (16 channels) are one symbol to torch, and cost a graph.
EVEN, RAGGED = ((1, 12, 10), (1, 20, 20), (1, 6, 8)), ((1, 7, 5), (1, 9, 11))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "flux2", "qwenimage"])
def test_graphs_of_dynamic_shapes_are_good_for_every_grid(name):
    """One for all grids that the scale divides, as the stock model has, and one for the others."""
    torch._dynamo.reset()
    handle, counter = elastic_of(name), CompileCounterWithBackend("eager")
    compiled = torch.compile(handle.model, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for grid in (*EVEN, *RAGGED, *EVEN):
        call = CASES[name].call(2, grid, 700.0)
        expected = run(handle, call, WEAK)
        with torch.no_grad(), handle.using(WEAK):
            torch.testing.assert_close(compiled(**call).sample, expected)
        graphs.append(counter.frame_count)
    assert graphs == [1] * len(EVEN) + [2] * len(RAGGED) + [2] * len(EVEN)


def test_full_mode_is_not_told_its_grid():
    """As with the stock model, grids of as many tokens share a graph of fixed shapes."""
    torch._dynamo.reset()
    handle, counter = elastic_of("flux"), CompileCounterWithBackend("eager")
    compiled = torch.compile(handle.model, backend=counter, fullgraph=True)
    for grid in ((1, 8, 8), (1, 4, 16)):
        call = CASES["flux"].call(2, grid, 700.0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**call).sample, run(handle, call))
    assert counter.frame_count == 1


def test_another_run_needs_no_other_graph(elastic):
    """Merged weights are made anew for each run, outside the graph."""
    counter = CompileCounterWithBackend("eager")
    elastic.model.compile(backend=counter, fullgraph=True)
    x, labels = torch.randn(4, 1, 32, 32), torch.tensor([1, 2, 3, 4])
    elastic.schedule = Schedule.constant(Mode(2))
    with torch.no_grad():
        for time in (500.0, 100.0) * 12:  # the level goes up again: a new run
            elastic.model(x, timestep=torch.full((4,), time), class_labels=labels)
    assert counter.frame_count == 1


def test_a_copy_does_not_call_the_original(elastic):
    elastic.model.compile(backend="eager")
    expected = forward(elastic, Mode(2))
    twin = copy.deepcopy(elastic.model)
    with torch.no_grad():
        for parameter in elastic.model.parameters():
            parameter.zero_()
    from ditdial import handle_of

    torch.testing.assert_close(forward(handle_of(twin), Mode(2)), expected)


@pytest.mark.parametrize("whole", [False, True])
@torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
def test_more_modes_than_one_function_may_have_graphs(elastic, whole):
    """Otherwise torch gives up at its limit and runs the rest as eager."""
    modes = [Mode(1), Mode(2), Mode(4)]
    eager = [forward(elastic, mode) for mode in modes]
    counter, stock = CompileCounterWithBackend("eager"), elastic.model
    if whole:
        model = torch.compile(stock, backend=counter)
    else:
        stock.compile(backend=counter)
        model = stock
    x = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    times, labels = torch.full((4,), 500.0), torch.tensor([1, 2, 3, 4])
    for mode, expected in zip(modes * 2, eager * 2, strict=True):
        with torch.no_grad(), elastic.using(mode):
            out = model(x, timestep=times, class_labels=labels).sample
        torch.testing.assert_close(out, expected)
    assert counter.frame_count == 3


@pytest.mark.parametrize("keep", [None, 0.5])
def test_one_graph_per_sub_network(elastic, keep):
    """Routed widths: neighbouring steps that share a bucket share a graph, with fixed counts."""
    elastic.remove()
    handle = elastify(elastic.model, DyDiT(groups=4, tokens=keep is not None))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for routers in handle._engine.wiring.new.routers.values():
            for parameter in routers.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    schedule = Schedule.constant(Mode(width=0.5, token_keep=keep))
    handle.schedule = schedule
    handle._engine.surgery.widths.buckets = 1
    pipe = PixelDiTPipeline(handle.model, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    again = elastify(pipe, handle.adapter())
    again.schedule, again._engine.surgery.widths.buckets = schedule, 1

    def draw():
        return pipe([1, 2], seeds=[0, 1], num_inference_steps=6, output_type="pt").images

    expected = draw()
    counter = CompileCounterWithBackend("eager")
    handle.model.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(draw(), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
