"""Small things, each real: gradients, wrong bases, grids that end at the data, what is printed."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig
from tests.backbones.pipes import PIPES
from tests.backbones.tiny import CASES
from tests.elastic_models import call_of
from tests.wild.bounded import command

from ditdial import (
    FULL,
    Adapter,
    Budget,
    DyDiT,
    Mode,
    PixelDiTPipeline,
    Schedule,
    Segment,
    elastify,
)
from ditdial.cli.app import main
from ditdial.host.device import device_name
from ditdial.host.parametrization import is_flow_scheduler, parametrization
from ditdial.plan.calibration import FILE, Calibration
from ditdial.plan.kept_seconds import added, keep
from ditdial.plan.seconds import Seconds
from ditdial.reference import load_reference, reference_adapter
from ditdial.training.config import load_recipe
from ditdial.training.tasks import build_task

WEAK = Mode(2)
HALF = Mode(width=0.5)


# DyDiT's gates


def channel_gates(handle):
    """Logits ``(S - 1,)``, and the slot of each channel, of the last block."""
    parameters = dict(handle.model.named_parameters())
    buffers = dict(handle.model.named_buffers())
    bias = next(value for name, value in parameters.items() if name.endswith("channel_bias"))
    weight = next(value for name, value in parameters.items() if name.endswith("channel_weight"))
    slots = next(value for name, value in buffers.items() if name.endswith("channels_1"))
    return weight, bias, slots


def test_the_gradient_of_a_channel_router_is_that_of_gates_before_the_activation():
    """DyDiT (2410.03456): the gate multiplies what enters the activation."""
    model = CASES["dit"].model()
    torch.manual_seed(2)
    handle = elastify(model, DyDiT(widths=(0.5,), groups=8, tokens=False))
    weight, bias, slots = channel_gates(handle)
    with torch.no_grad():  # the same gates at every time: open, closed, open, ...
        weight.zero_()
        bias.copy_(torch.tensor([1.0, -1.0] * bias.shape[1])[: bias.shape[1]].expand_as(bias))
    widen, narrow = model.transformer_blocks[1].ff.net[0], model.transformer_blocks[1].ff.net[2]
    seen = {}
    hooks = [
        widen.register_forward_pre_hook(lambda _, given: seen.update(x=given[0])),
        narrow.register_forward_hook(lambda _, given, y: (y.retain_grad(), seen.update(y=y))[0]),
    ]
    handle._engine.wiring.new.gated = True
    with handle.using(HALF):
        model(**call_of("dit", count=1)).sample.square().sum().backward()
    for hook in hooks:
        hook.remove()
    gates = torch.cat([torch.ones(1), (bias[1].detach() > 0).float()])[slots]
    hidden = F.linear(seen["x"].detach(), widen.proj.weight, widen.proj.bias).detach()
    entering = (hidden * gates).requires_grad_()
    F.gelu(entering, approximate=widen.approximate).backward(seen["y"].grad @ narrow.weight)
    by_channel = (entering.grad * hidden).sum(dim=(0, 1)).detach()
    by_slot = torch.zeros(len(bias[1]) + 1).index_add(0, slots, by_channel)[1:]
    soft = torch.sigmoid(bias[1].detach() / 5.0)
    expected = by_slot * soft * (1 - soft) / 5.0
    assert F.cosine_similarity(bias.grad[1], expected, dim=0) > 0.9999
    torch.testing.assert_close(bias.grad[1], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "latte", "wan"])
def test_every_class_gates_its_channels_before_their_activation(name):
    """In every block: the gradient of a gate is that of a factor of what its layer returns."""
    model = CASES[name].model()
    torch.manual_seed(2)
    handle = elastify(model, DyDiT(widths=(0.5,), tokens=False))
    parameters = dict(handle.model.named_parameters())
    bias = next(value for key, value in parameters.items() if key.endswith("channel_bias"))
    weight = next(value for key, value in parameters.items() if key.endswith("channel_weight"))
    with torch.no_grad():
        weight.zero_()
        bias.copy_(torch.tensor([1.0, -1.0] * bias.shape[1])[: bias.shape[1]].expand_as(bias))
    blocks, seen = list(handle.backbone.routed_blocks(model)), {}

    def see(index):
        def hook(layer, given, y):
            y.retain_grad()
            seen[index] = y, F.linear(given[0], layer.weight, layer.bias).detach()

        return hook

    hooks = [b.widen.register_forward_hook(see(index)) for index, b in enumerate(blocks)]
    handle._engine.wiring.new.gated = True
    with handle.using(HALF):
        model(**call_of(name, count=1)).sample.square().sum().backward()
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(blocks)
    soft = torch.sigmoid(bias.detach() / 5.0)
    buffers = dict(handle.model.named_buffers())
    for index, (y, hidden) in seen.items():
        slots = next(value for key, value in buffers.items() if key.endswith(f"channels_{index}"))
        by_channel = (y.grad * hidden).flatten(0, -2).sum(dim=0)
        by_slot = torch.zeros(bias.shape[1] + 1).index_add(0, slots, by_channel)[1:]
        expected = by_slot * (soft * (1 - soft))[index] / 5.0
        torch.testing.assert_close(bias.grad[index], expected, rtol=1e-3, atol=1e-5)


# Bases that are not what the recipe trains


@pytest.mark.parametrize("kind", ["epsilon", "another class"])
def test_a_base_that_does_not_predict_velocities_is_refused(
    adapter_recipe, make_model, tmp_path, kind
):
    """A pipeline of three channels that predicts the noise; a model of another class."""
    folder = tmp_path / "pipe" / "transformer"
    make_model(in_channels=3, sample_size=16, num_embeds_ada_norm=2).save_pretrained(folder)
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "pipe" / "scheduler")
    if kind == "another class":
        config = json.loads((folder / "config.json").read_text())
        config["_class_name"] = "PixArtTransformer2DModel"
        (folder / "config.json").write_text(json.dumps(config))
        shutil.rmtree(tmp_path / "pipe" / "scheduler")
    overrides = [f"adapter.base={str(folder)!r}", "data.channels=3"]
    with pytest.raises(ValueError, match=r"adapter\.base"):
        build_task(load_recipe(adapter_recipe, overrides))


def test_a_base_of_other_channels_than_the_data_is_refused(adapter_recipe, make_model, tmp_path):
    make_model(in_channels=3, sample_size=16, num_embeds_ada_norm=2).save_pretrained(
        tmp_path / "colour"
    )
    with pytest.raises(ValueError, match="channels"):
        build_task(load_recipe(adapter_recipe, [f"adapter.base={str(tmp_path / 'colour')!r}"]))


# Grids that end at the data


@pytest.mark.parametrize("steps", [5, 12])
def test_the_steps_of_the_reference_end_at_the_data_and_none_is_spent_on_nothing(steps):
    """Levels 1, (N - 1) / N, ..., 1 / N: each step moves as far as the others."""
    pipe = load_reference()
    handle = elastify(pipe, reference_adapter())
    levels = [step.level for step in handle.plan(steps).steps]
    assert levels == pytest.approx([1 - step / steps for step in range(steps)], abs=2e-3)


def measured():
    """The calibration that ships with the reference."""
    found = Adapter.from_pretrained(reference_adapter()).calibration
    assert found is not None
    return found


def test_a_step_that_moves_next_to_nothing_does_next_to_no_damage():
    calibration = measured()
    damage = calibration.damage([1.0, 0.5, 0.2, 0.001])
    coarse = [calibration.names.index(name) for name in calibration.names if "full" not in name]
    assert (damage[-1, coarse] < damage[-2, coarse]).all()


# What a run tells


def test_a_report_counts_what_a_step_cache_left_out_or_says_that_it_does_not():
    case = PIPES["flux"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    handle.schedule = Schedule.weak_first(0.5)
    blocks = pipe.transformer.transformer_blocks
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    ran = []
    blocks[1].attn.to_q.register_forward_pre_hook(lambda *_: ran.append(True))
    case.draw(pipe, guided=False, num_inference_steps=12)
    report = handle.report()
    assert len(ran) == 2  # once per mode
    told = "step caches" in str(report) and "not counted" in str(report)
    assert told or report.ratio < 0.4


def test_a_run_at_another_guidance_scale_than_the_calibrated_one_warns():
    pipe = load_reference()
    pipe.set_progress_bar_config(disable=True)
    handle = elastify(pipe, reference_adapter())
    handle.budget = 0.6
    with pytest.warns(UserWarning, match="guidance"):
        pipe([1], num_inference_steps=2, guidance_scale=5.0, seeds=[0])


def test_a_run_at_the_calibrated_guidance_scale_does_not_warn():
    pipe = load_reference()
    pipe.set_progress_bar_config(disable=True)
    handle = elastify(pipe, reference_adapter())
    handle.budget = 0.6
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe([1], num_inference_steps=2, guidance_scale=measured().guidance_scale, seeds=[0])


def test_a_budget_in_seconds_that_no_mode_can_keep_is_refused_without_an_empty_range():
    pipe = load_reference()
    handle = elastify(pipe, reference_adapter())
    alone = {mode.name: 1.0 if mode == FULL else 1.2 for mode in handle.modes}
    slow = Seconds(device=device_name(torch.device("cpu")), rows=1, alone=alone, together=alone)
    handle.calibration = measured().with_seconds(slow)
    with pytest.raises(ValueError, match="budget") as error:
        handle.budget = Budget(0.5, "seconds")
    assert not re.search(r"legal: 1(\.0)? .*to 1\b", str(error.value))
    assert "seconds" in str(error.value)


def test_a_plan_states_the_grid_the_tokens_the_steps_and_the_guidance_that_it_assumed():
    case = PIPES["flux"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    for guidance in (True, False):
        facts = {"grid": (1, 8, 12), "text_tokens": 7, "guidance": guidance}
        told = str(handle.plan(5, **facts))
        assert re.search(r"8 ?x ?12", told)
        assert re.search(r"\b7 text", told)
        assert re.search(r"\b5 steps", told)
        assert "guid" in told
    assert str(handle.plan(5, **{**facts, "guidance": True})) != told


# Seconds of this device


def test_seconds_of_a_reference_adapter_are_kept_outside_the_package(monkeypatch, tmp_path):
    import ditdial.reference

    package = tmp_path / "package"
    own = reference_adapter().name
    for name in (f"mnist/{own}", "mnist/pipeline"):
        shutil.copytree(ditdial.reference.HERE / name, package / name)
    monkeypatch.setattr(ditdial.reference, "HERE", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    before = (package / "mnist" / own / "calibration.json").read_bytes()
    outcome = command("calibrate", "--only-seconds", "--steps", "2", "--images", "1")
    assert outcome["code"] == 0, outcome
    assert (package / "mnist" / own / "calibration.json").read_bytes() == before


def test_seconds_that_were_kept_are_found_again(monkeypatch, tmp_path):
    """By whatever reads the adapter, and only beside the errors that they were measured with."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    slow = Seconds(device="abacus", rows=1, alone={"full": 60.0, "patch2": 20.0})
    file = keep(measured().with_seconds(slow))
    assert file.is_relative_to(tmp_path / "ditdial")
    assert measured().seconds_on("abacus") == slow
    assert elastify(load_reference(), reference_adapter()).calibration == measured()
    shipped = Calibration.load(reference_adapter())
    other = replace(shipped, guidance_scale=2.0)
    assert added(shipped) != shipped
    assert added(other) == other
    file.write_text('{"seconds": [{"device": 7}]}')
    with pytest.raises(ValueError, match=r"\.json'.*kept seconds have missing"):
        measured()


def test_a_whole_calibration_of_a_shipped_adapter_needs_a_file_of_yours():
    before = (reference_adapter() / FILE).read_bytes()
    outcome = command("calibrate", "--force", "--steps", "2", "--images", "1")
    assert outcome["code"] == 2
    assert "output = None; legal" in " ".join(outcome["err"].split())
    assert (reference_adapter() / FILE).read_bytes() == before


# What a plan and the tables tell


def test_a_plan_tells_that_step_caches_are_not_counted():
    case = PIPES["flux"]
    pipe = case.pipe()
    handle = case.elastic(pipe)
    before = handle.plan(4)
    assert "step caches" not in str(before)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    plan = handle.plan(4)
    assert "step caches are not counted" in str(plan)
    assert (plan.to_dict()["step_cache"], plan.ratio) == (True, before.ratio)
    assert before.to_dict()["step_cache"] is False


def run_command(monkeypatch, *arguments):
    """Run a command of the command line here; it has to come to a good end."""
    monkeypatch.setattr("sys.argv", ["ditdial", *arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code


def test_results_tell_the_noise_levels_that_ran(monkeypatch, capsys, tmp_path):
    sizes = ("--images", "8", "--sets", "2", "--steps", "4")
    run_command(monkeypatch, "eval", *sizes, "--output", str(tmp_path / "eval.json"))
    assert "4 steps at noise levels from 1 to 0.25" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert row["levels"] == [1.0, 0.25]


@pytest.mark.parametrize(("asked", "scale"), [((), 1.45), (("--guidance-scale", "3"), 3.0)])
def test_the_command_samples_a_budget_at_its_calibrated_scale(monkeypatch, tmp_path, asked, scale):
    calls, draw = [], PixelDiTPipeline.__call__

    def seen(self, *args, **kwargs):
        calls.append(kwargs["guidance_scale"])
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(PixelDiTPipeline, "__call__", seen)
    few = ("--labels", "1", "--steps", "3", "--budget", "0.5")
    run_command(monkeypatch, "sample", str(tmp_path), *few, *asked)
    assert set(calls) == {scale}


# Schedulers


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_a_subclass_is_what_its_class_is(name):
    """Everywhere: what says how a model predicts, and the pipeline that needs velocities."""
    stock = getattr(diffusers, name)
    own = type("Mine", (stock,), {})
    for scheduler in (stock(), own()):
        assert is_flow_scheduler(scheduler)
        assert parametrization(SimpleNamespace(scheduler=scheduler)).kind == "flow_prediction"
        pipe = load_reference()
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        pipe([1], num_inference_steps=2, seeds=[0], guidance_scale=1.0)
        handle = elastify(pipe, reference_adapter())
        assert handle.plan(2).steps


# Values of the wrong kind


@pytest.mark.parametrize("field", ["mode", "guide"])
def test_a_segment_takes_no_name_for_a_mode(field):
    with pytest.raises((ValueError, TypeError), match=rf"{field} = 'patch2'; legal"):
        Segment(start=1, stop=0, **{field: "patch2"})
