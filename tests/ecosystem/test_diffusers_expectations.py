"""An elastic model where diffusers expects one of its own: in graphs, folders and pipelines."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.training_utils import EMAModel
from tests.backbones.pipes import PIPES, PROMPTS, SEEDS, STEPS, PipeCase, given, t5, tokenizer
from tests.backbones.tiny import CASES
from tests.elastic_models import WEAK, call_of, elastic, run, run_as, shake
from torch._dynamo.testing import CompileCounterWithBackend

from ditdial import FULL, FlexiDiT, Schedule, elastify, handle_of
from ditdial.layers import swap
from ditdial.layers.text import TextSeam
from ditdial.layers.tokens import ConditioningSeam
from ditdial.runtime import model_class

NAMES = ("sd3", "flux", "wan")
names = pytest.mark.parametrize("name", NAMES)
modes = pytest.mark.parametrize("mode", [FULL, WEAK], ids=str)
recipes = pytest.mark.parametrize("recipe", ["lora", "shared"])


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
@pytest.mark.parametrize("name", ["dit", "sd3", "wan", "sana"])
def test_an_export_keeps_the_mode_and_leaves_nothing_behind(name, mode):
    handle, call = elastic(name), call_of(name)
    handle.schedule = Schedule.constant(mode)
    with torch.no_grad():
        exported = torch.export.export(handle.model, (), call).module()
        torch.testing.assert_close(exported(**call).sample, run(handle, call))
    assert torch.equal(run(handle, call), run(elastic(name), call, mode))


def test_rotary_phases_are_made_from_the_latent_itself(monkeypatch):
    """A second latent is one more graph where it is of another kind, as in inference mode."""
    handle = elastic("lumina2")
    rope, calls = type(CASES["lumina2"].model().rope_embedder), []
    stock = rope.forward
    monkeypatch.setattr(rope, "forward", lambda *args: calls.append(args[1]) or stock(*args))
    for grid, times in (((1, 8, 8), 1), ((1, 7, 5), 2)):  # groups reach over the second's border
        call = CASES["lumina2"].call(1, grid, 700.0)
        calls.clear()
        run(handle, call, WEAK)
        assert len(calls) == times
        assert calls[0] is call["hidden_states"]


def test_an_export_in_a_coarse_mode_needs_a_grid_that_does_not_stand_in_a_tensor():
    handle, call = elastic("flux"), call_of("flux")
    exported = torch.export.export(handle.model, (), call).module()
    torch.testing.assert_close(exported(**call).sample, run(handle, call, FULL))
    handle.schedule = Schedule.constant(WEAK)
    with pytest.raises(ValueError, match=r"numbers of img_ids.*legal: full mode"):
        torch.export.export(handle.model, (), call)


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


@pytest.mark.parametrize("name", ["dit", "pixart", "flux", "wan"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_hold_the_stock_model(name, variant, tmp_path):
    handle, call, stock = elastic(name), call_of(name), CASES[name].model()
    expected = {mode: run(handle, call, mode) for mode in (FULL, WEAK)}
    size = stock.get_memory_footprint() * 0.7 / 1024
    handle.model.save_pretrained(tmp_path, max_shard_size=f"{size:.0f}KB", variant=variant)
    infix = "" if variant is None else f".{variant}"
    index = tmp_path / f"diffusion_pytorch_model.safetensors.index{infix}.json"
    weights = json.loads(index.read_text())["weight_map"]
    assert set(weights) == set(stock.state_dict())
    assert set(weights.values()) == {f.name for f in tmp_path.glob("*.safetensors")}
    assert len(set(weights.values())) > 1
    again = type(handle.model).from_pretrained(tmp_path, variant=variant)
    for mode in (FULL, WEAK):
        assert torch.equal(run(again, call, mode), expected[mode])


def places(stock):
    """A device map as people write them: blocks on the disk, the rest in memory."""
    names = [n for n, _ in stock.named_children()]
    names += [n for n, _ in stock.named_parameters() if "." not in n]
    return {n: "disk" if "blocks" in n or "layers" in n else "cpu" for n in names}


@pytest.mark.parametrize("name", ["pixart", "flux", "wan", "lumina2"])
@pytest.mark.parametrize("kind", ["by hand", "auto", "disk"])
@recipes
def test_a_device_map_places_the_new_tensors_too(name, kind, recipe, tmp_path):
    handle, call, stock = elastic(name, recipe=recipe), call_of(name), CASES[name].model()
    handle.model.save_pretrained(tmp_path / "m")
    options = {"offload_folder": str(tmp_path / "away"), "output_loading_info": True}
    if kind == "auto":
        half = handle.model.get_memory_footprint() // 2
        options |= {"device_map": "auto", "max_memory": {"cpu": half}}
    else:
        options["device_map"] = places(stock) if kind == "by hand" else {"": "disk"}
    for _ in range(2):  # what the first left in the folder is not read by the second
        shake(handle.model, lambda key: True, seed=8)
        handle.model.save_pretrained(tmp_path / "m")
        again, facts = type(handle.model).from_pretrained(tmp_path / "m", **options)
        assert not facts["missing_keys"]
        assert any(parameter.is_meta for parameter in again.parameters())
        assert set(again.hf_device_map.values()) <= {"cpu", "disk"}
        for mode in (FULL, WEAK, FULL):
            assert torch.equal(run(again, call, mode), run(handle, call, mode))


def test_a_device_map_of_a_class_that_cannot_be_split_is_refused_as_for_the_stock_class(tmp_path):
    handle = elastic("dit")
    handle.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not support `device_map='auto'`"):
        type(handle.model).from_pretrained(tmp_path, device_map="auto")
    with pytest.raises(ValueError, match="offload"):
        type(handle.model).from_pretrained(tmp_path, device_map={"": "disk"})


@recipes
@pytest.mark.parametrize("name", ["dit", "flux", "wan", "z-image"])
def test_an_average_of_weights_is_saved_and_loaded_by_the_class(name, recipe, tmp_path):
    handle, call = elastic(name, recipe=recipe), call_of(name)
    cls, model = type(handle.model), handle.model
    average = EMAModel(
        model.parameters(), decay=0.5, model_cls=cls, model_config=model.config, foreach=True
    )
    shake(model, lambda key: True, seed=9)
    average.step(model.parameters())
    average.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, cls)
    assert (again.decay, again.optimization_step) == (0.5, 1)
    for ours, theirs in zip(again.shadow_params, average.shadow_params, strict=True):
        assert torch.equal(ours, theirs)
    loaded = cls.from_pretrained(tmp_path)
    average.copy_to(model.parameters())
    for mode in (FULL, WEAK):
        found, expected = run(loaded, call, mode), run(handle, call, mode)
        assert all(map(torch.equal, found, expected))


def test_a_model_from_the_config_is_as_elastic_as_the_class():
    handle, other = elastic("flux"), elastify(CASES["flux"].model(), FlexiDiT(rank=5, scales=(4,)))
    for one in (handle, other):
        built = type(one.model).from_config(one.model.config)
        assert handle_of(built).method == one.method
        assert [k for k, _ in built.named_parameters()] == [
            k for k, _ in one.model.named_parameters()
        ]
        built, unused = type(one.model).from_config(
            one.model.config, return_unused_kwargs=True, more=1
        )
        assert handle_of(built) is not None
        assert unused == {"more": 1}
    stock = type(CASES["flux"].model())
    assert handle_of(model_class.elastic_class(stock).from_config(handle.model.config)) is None
    assert type(handle.model).from_single_file == stock.from_single_file


# Pickles: torch.save of whole models, and processes that are sent one


def as_if_elsewhere():
    """Forget all generated classes, as a new process has none."""
    for made in (model_class.elastic_class, model_class._alike, swap._generated):
        made.cache_clear()


@modes
@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "latte", "z-image"])
def test_a_whole_model_is_pickled(name, mode):
    handle, call, stock = elastic(name), call_of(name), CASES[name].model()
    handle.schedule = Schedule.constant(mode)
    expected = run(handle, call)
    handle.model.compile(backend="eager")  # stays behind, as with a stock model
    file = io.BytesIO()
    torch.save(handle.model, file)
    pickles = pickle.dumps(handle.model), pickle.dumps(type(handle.model))
    as_if_elsewhere()
    twin, cls = map(pickle.loads, pickles)
    assert type(twin) is cls is not type(handle.model)
    file.seek(0)
    for model in (twin, torch.load(file, weights_only=False)):
        assert all(map(torch.equal, run(model, call), expected))
        assert handle_of(model).report().calls[0].mode == mode
        handle_of(model).remove()
        assert all(map(torch.equal, run(model, call), run(stock, call)))
        assert {type(m) for m in model.modules()} == {type(m) for m in stock.modules()}
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_module_that_was_swapped_twice_is_pickled():
    layer, wiring = torch.nn.Linear(2, 3), elastic("dit")._engine.wiring
    for mixin in (TextSeam, ConditioningSeam):
        swap.swap_class(layer, mixin, wiring)
    text, bases = pickle.dumps(layer), type(layer).__mro__
    as_if_elsewhere()
    twin = pickle.loads(text)
    assert [cls.__name__ for cls in type(twin).__mro__] == [cls.__name__ for cls in bases]
    for _ in range(2):
        swap.restore_class(twin)
    assert type(twin) is torch.nn.Linear
    assert torch.equal(twin.weight, layer.weight)


def test_another_process_loads_a_whole_model(tmp_path):
    handle, call = elastic("sd3"), call_of("sd3")
    handle.schedule = Schedule.constant(WEAK)
    torch.save((handle.model, call, run(handle, call)), tmp_path / "all.pt")
    code = (
        "import sys, torch; model, call, expected = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.equal(model(**call).sample, expected); print(type(model).from_pretrained)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "all.pt"], capture_output=True, text=True
    )
    assert "ElasticModel.from_pretrained" in done.stdout, done.stderr


def answer(rank, model, call, out):
    """What a started process does with the model it is given."""
    torch.set_num_threads(1)
    out.copy_(run(model, call))
    assert {c.mode for c in handle_of(model).report().calls} == {WEAK}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("flux", "lora"),
        pytest.param("sd3", "lora", marks=pytest.mark.slow),
        pytest.param("flux", "shared", marks=pytest.mark.slow),
        ("sd3", "shared"),
    ],
)
def test_a_started_process_runs_the_model_it_is_given(name, recipe):
    """Not a pickle read here, where the generated classes are still known; its memory is shared."""
    handle, call = elastic(name, recipe=recipe), call_of(name)
    handle.schedule = Schedule.constant(WEAK)
    expected = run(handle, call)
    handle.model.share_memory()
    out = torch.zeros_like(expected).share_memory_()
    torch.multiprocessing.spawn(answer, args=(handle.model, call, out), nprocs=1)
    torch.testing.assert_close(out, expected)
    assert all(parameter.is_shared() for parameter in handle.model.parameters())
    assert torch.equal(run(handle, call), expected)


@pytest.mark.parametrize("name", ["sd3", "lumina2"])
def test_a_copied_pipeline_runs_as_the_one_it_comes_from(name):
    case = PIPES[name]
    pipe = case.pipe()
    handle = case.elastic(pipe, scales=(2,))
    handle.schedule = Schedule.weak_first(0.5, guidance="weak")
    pickles = pickle.dumps(pipe), pickle.dumps(pipe.transformer)
    as_if_elsewhere()
    again, alone = map(pickle.loads, pickles)
    expected = case.draw(pipe)
    for other in (again, copy.deepcopy(pipe)):
        assert handle_of(other)._planning.pipe is other
        assert torch.equal(case.draw(other), expected)
        assert [c.mode for c in handle_of(other).report().calls] == [
            c.mode for c in handle.report().calls
        ]
    assert handle_of(alone)._planning.pipe is None
    assert handle._planning.pipe is pipe


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


def cogvideox():
    parts = {"tokenizer": tokenizer, "text_encoder": t5}
    scheduler = diffusers.CogVideoXDDIMScheduler()
    return given(diffusers.CogVideoXPipeline, "cogvideox-2b", scheduler, **parts)()


SILENT = {
    name: PIPES[name] for name in ("dit", "latte", "pixart-alpha", "pixart-sigma", "auraflow")
}
VIDEO = {"height": 128, "width": 128, "num_frames": 9, "max_sequence_length": 5}
SILENT["cogvideox"] = PipeCase(cogvideox, VIDEO, (3, 8, 8), 5)


grad_modes = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])


@grad_modes
@pytest.mark.parametrize("case", SILENT.values(), ids=SILENT)
def test_two_prompts_from_equal_noise_are_no_branches(case, context):
    """These pipelines have no attribute that tells whether guidance is on."""
    with context():
        assert_no_branches(case)


def assert_no_branches(case):
    pipe, seeds = case.pipe(), (SEEDS[0], SEEDS[0])
    handle = case.elastic(pipe, scales=(2,))
    handle.schedule = Schedule.weak_first(0.0, guidance="weak")
    stock = case.draw(case.pipe(), PROMPTS, seeds, guided=False)
    with pytest.warns(UserWarning, match="no guidance branch"):
        found = case.draw(pipe, PROMPTS, seeds, guided=False)
    calls = handle.report().calls
    assert [(c.mode, c.guide, c.rows) for c in calls] == [(FULL, None, 2)] * STEPS
    assert torch.equal(found, stock)
    case.draw(pipe, PROMPTS, seeds)
    calls = handle.report().calls
    assert [(c.mode, c.guide, c.rows) for c in calls] == [(FULL, WEAK, 4)] * STEPS


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "chroma"])
def test_inference_mode_changes_nothing(name):
    """Its tensors have no version: none of what is found out about calls may need one."""
    case, found = PIPES[name], []
    for context in (torch.no_grad, torch.inference_mode):
        pipe = case.pipe()
        handle = case.elastic(pipe, scales=(2,))
        run_as(handle, keep_text=name == "wan")
        handle.schedule = Schedule.weak_first(0.5, guidance="weak")
        with context():
            pictures = [case.draw(pipe) for _ in range(2)]
        calls = [(c.mode, c.guide, c.branch, c.macs) for c in handle.report().calls]
        found.append((pictures, calls))
    (expected, calls), (pictures, again) = found
    assert again == calls
    assert all(map(torch.equal, pictures, expected))


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
