"""An elastic model where diffusers expects one of its own: in graphs, folders and pipelines."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from tests.backbones.pipes import PIPES
from tests.backbones.tiny import CASES
from tests.elastic_models import WEAK, call_of, elastic, run
from torch._dynamo.testing import CompileCounterWithBackend

from elastic_dit import FULL, Schedule, handle_of

NAMES = ("sd3", "flux", "wan")
names = pytest.mark.parametrize("name", NAMES)
modes = pytest.mark.parametrize("mode", [FULL, WEAK], ids=str)


def row(call, index):
    count = len(call["hidden_states"])
    return {
        key: value[index : index + 1] if torch.is_tensor(value) and len(value) == count else value
        for key, value in call.items()
    }


# Rows with different times, as in training


@modes
@names
def test_rows_with_times_of_their_own_are_as_if_alone(name, mode):
    handle, call = elastic(name), call_of(name)
    call["timestep"] = call["timestep"] * torch.tensor([1.0, 0.3])
    handle.schedule = Schedule.constant(mode)
    together = run(handle, call)
    assert handle.report().calls[0].mode == mode
    for index in range(2):
        alone = run(handle, row(call, index))
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)


def test_rows_on_both_sides_of_an_edge_are_refused():
    handle, call = elastic("sd3"), call_of("sd3")
    handle.schedule = Schedule.weak_first(0.5)
    call["timestep"] = torch.tensor([900.0, 600.0])
    run(handle, call)
    assert handle.report().calls[0].mode == WEAK
    call["timestep"] = torch.tensor([900.0, 100.0])
    with pytest.raises(ValueError, match=r"levels of a batch go from 0\.1 to 0\.9.*one segment"):
        run(handle, call)


# torch.compile on the whole model, and graphs that hold more than it


@names
def test_a_compiled_model_has_one_whole_graph_per_mode(name):
    torch._dynamo.reset()
    handle = elastic(name)
    handle.schedule = Schedule.weak_first(0.5)
    calls = [call_of(name, time) for time in (900.0, 800.0, 300.0, 200.0)]
    expected = [run(handle, call) for call in calls]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(handle.model, backend=counter, fullgraph=True)
    for _ in range(2):
        for call, wanted in zip(calls, expected, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(compiled(**call).sample, wanted)
        assert [c.mode for c in handle.report().calls] == [WEAK, WEAK, FULL, FULL]
    assert counter.frame_count == 2
    assert torch.equal(run(handle, calls[0]), expected[0])  # the model itself stays eager


@modes
@names
def test_a_graph_around_the_model_takes_a_schedule_of_one_mode(name, mode):
    torch._dynamo.reset()
    handle, call = elastic(name), call_of(name)
    handle.schedule = Schedule.constant(mode)
    if mode == WEAK and name == "flux":
        pytest.skip("its grid is read from the ids")
    expected = run(handle, call)

    @torch.compile(backend="eager", fullgraph=True)
    def doubled(call):
        return 2 * handle.model(**call).sample

    with torch.no_grad():
        torch.testing.assert_close(doubled(call), 2 * expected)


def test_a_graph_around_the_model_refuses_a_schedule_of_two_modes():
    torch._dynamo.reset()
    handle, call = elastic("sd3"), call_of("sd3")
    handle.schedule = Schedule.weak_first(0.5)
    around = torch.compile(lambda call: handle.model(**call).sample, backend="eager")
    with torch.no_grad():  # without fullgraph it breaks the graph instead
        torch.testing.assert_close(around(call), run(handle, call))
    whole = torch.compile(lambda call: handle.model(**call).sample, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="one mode at all noise levels"):
        whole(call)


@modes
@pytest.mark.parametrize("name", ["dit", "sd3", "wan"])
def test_an_export_keeps_the_mode_and_leaves_nothing_behind(name, mode):
    handle, call = elastic(name), call_of(name)
    handle.schedule = Schedule.constant(mode)
    with torch.no_grad():
        exported = torch.export.export(handle.model, (), call).module()
        torch.testing.assert_close(exported(**call).sample, run(handle, call))
    assert torch.equal(run(handle, call), run(elastic(name), call, mode))


# The class


@names
def test_the_class_equals_the_stock_class(name):
    model, stock = elastic(name).model, type(CASES[name].model())
    assert type(model) is not stock
    assert type(model) in (stock,)
    assert stock in {type(model)}
    assert type(model) not in (torch.nn.Module,)
    assert isinstance(model, stock)


@names
def test_the_class_loads_what_its_model_saved(name, tmp_path):
    handle, call = elastic(name), call_of(name)
    handle.schedule = Schedule.constant(WEAK)
    cls, stock = type(handle.model), type(CASES[name].model())
    expected = run(handle, call)
    handle.model.save_pretrained(tmp_path / "here")
    again = cls.from_pretrained(tmp_path, subfolder="here")
    assert torch.equal(run(again, call), expected)
    assert handle_of(again).schedule.to_json() == handle.schedule.to_json()
    half = cls.from_pretrained(tmp_path / "here", torch_dtype=torch.bfloat16)
    kept = half._keep_in_fp32_modules or ()
    for key, parameter in half.named_parameters():
        wanted = torch.float32 if set(kept) & set(key.split(".")) else torch.bfloat16
        assert parameter.dtype == wanted, key
    assert handle_of(stock.from_pretrained(tmp_path / "here")) is None


def test_saving_and_loading_take_the_stock_arguments_by_name(tmp_path):
    pipe = PIPES["sd3"].pipe()
    handle, call = PIPES["sd3"].elastic(pipe, scales=(2,)), call_of("sd3")
    expected = run(handle, call, WEAK)
    pipe.save_pretrained(tmp_path, variant="fp16", safe_serialization=False)
    files = {path.name for path in (tmp_path / "transformer").iterdir()}
    assert files == {"config.json", "diffusion_pytorch_model.fp16.bin", "elastic.adapter"}
    handle.model.save_pretrained(save_directory=tmp_path / "own", max_shard_size="20KB")
    assert (tmp_path / "own" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    again = type(handle.model).from_pretrained(pretrained_model_name_or_path=tmp_path / "own")
    assert torch.equal(run(again, call, WEAK), expected)


def test_only_the_main_process_saves(tmp_path):
    elastic("sd3").model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "elastic.adapter").exists()


# Pipelines


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_a_pipeline_made_of_an_elastic_model_is_a_stock_one_to_others(name, tmp_path):
    case = PIPES[name]
    pipe = case.pipe()
    stock = case.draw(pipe)
    handle = case.elastic(pipe, scales=(2,))
    handle.schedule = Schedule.constant(WEAK)
    expected = case.draw(pipe)
    again = type(pipe)(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(case.draw(again), expected)
    again.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", type(handle.model).__name__]
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert handle_of(loaded) is None
    torch.testing.assert_close(case.draw(loaded), stock)
    other = type(pipe).from_pipe(again)
    other.set_progress_bar_config(disable=True)
    assert other.transformer is handle.model
    assert torch.equal(case.draw(other), expected)


# What others put on a model


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_fused_projections_stay_where_the_adapter_goes(name):
    handle, call = elastic(name), call_of(name)
    expected = run(handle, call, WEAK)
    handle.model.fuse_qkv_projections()
    for model in (handle.model, copy.deepcopy(handle.model)):
        torch.testing.assert_close(run(model, call, WEAK), expected)
    stock = CASES[name].model()
    stock.fuse_qkv_projections()
    handle.remove()
    assert torch.equal(run(handle.model, call), run(stock, call))
    classes = {type(module) for module in stock.modules()}
    assert {type(module) for module in handle.model.modules()} == classes


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_cache_with_one_state_goes_with_a_schedule_of_one_mode(name):
    handle, call = elastic(name), call_of(name)
    handle.schedule = Schedule.constant(WEAK)
    other = {**call, "hidden_states": call["hidden_states"] + 1}
    expected = [run(handle, each) for each in (call, other)]
    for reuse, same in ((1, True), (2, False)):
        handle.model.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=reuse, current_timestep_callback=lambda: 500
            )
        )
        found = [run(handle, each) for each in (call, other)]
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1]) is same
        handle.schedule = Schedule.weak_first(0.5)
        with pytest.raises(RuntimeError, match=r"one state .*a schedule of this mode alone"):
            run(handle, call_of(name, 900.0))
        handle.schedule = Schedule.constant(WEAK)
        handle.model.disable_cache()


@pytest.mark.parametrize("name", ["flux", "chroma"])
def test_ids_that_are_no_grid_are_taken_for_a_square(name):
    call, stock = call_of(name), CASES[name].model()
    call["img_ids"] = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    handle = elastic(name)
    with pytest.warns(UserWarning, match="img_ids are no rows and columns; the 64 tokens"):
        found = run(handle, call, FULL)
    assert torch.equal(found, run(stock, call))
    with pytest.warns(UserWarning, match="no rows and columns"):
        coarse = run(handle, {**call, "img_ids": call["img_ids"] + 0.25}, WEAK)
    assert coarse.shape == found.shape
    assert coarse.isfinite().all()
