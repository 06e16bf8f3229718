"""The loop: learns, and a killed run that is resumed repeats the unbroken one bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ditdial.training.base import BaseTask
from ditdial.training.config import OptimConfig, load_recipe
from ditdial.training.data import ImageData
from ditdial.training.ema import WeightAverage
from ditdial.training.loop import check_output, train
from ditdial.training.optim import build_optimizers
from ditdial.training.state import list_states, load_state, save_state
from ditdial.training.tasks import TASKS, build_task

WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(path, *overrides, resume=False, task=BaseTask):
    recipe = load_recipe(path, overrides)
    return train(recipe, task(recipe), ImageData(recipe.data), resume=resume)


def records(output):
    """What the log says, but for the seconds."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def same_export(one, other):
    ours, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def snapshot(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_a_tiny_run_learns_and_exports_a_stock_model(base_recipe, tmp_path):
    from diffusers import DiTTransformer2DModel

    export = run(base_recipe, "loop.images=640")
    rows = records(tmp_path / "run")
    losses = [row["loss"] for row in rows]
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[-1]["images"] == 640
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    model = DiTTransformer2DModel.from_pretrained(export)
    assert model.config.num_embeds_ada_norm == 2
    facts = json.loads((export / "training.json").read_text())
    assert (facts["data_mean"], facts["data_std"], facts["images_seen"]) == (0.4, 0.35, 640)
    assert facts["recipe"]["optim"]["lr"] == 3e-3
    assert not list((tmp_path / "run").rglob("*.bin"))
    assert not list((tmp_path / "run").rglob("*.pt"))


WORKER = """
import os, signal, sys
from ditdial.training.base import BaseTask
from ditdial.training.config import load_recipe
from ditdial.training.data import ImageData
from ditdial.training.loop import train

class Dying(BaseTask):
    steps = 0

    def loss(self, *args):
        self.steps += 1
        if self.steps == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(*args)

recipe = load_recipe(sys.argv[1], sys.argv[2:])
train(recipe, Dying(recipe), ImageData(recipe.data))
"""


def test_a_killed_run_resumes_to_the_unbroken_one_bit_for_bit(base_recipe, tmp_path):
    unbroken = run(base_recipe, f"output={tmp_path}/unbroken")
    overrides = [f"output={tmp_path}/broken"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets-cache")}
    command = [sys.executable, "-c", WORKER, str(base_recipe), *overrides]
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    broken = tmp_path / "broken"
    assert len(records(broken)) == 7
    assert [p.name for p in list_states(broken / "checkpoints")] == [
        "step-00000003",
        "step-00000006",
    ]
    # As if it had also been writing a log line and a checkpoint just then.
    with (broken / "log.jsonl").open("a") as log:
        log.write('{"step": 8, "lo')
    partial = broken / "checkpoints" / ".partial-step-00000009"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")

    export = run(base_recipe, *overrides, resume=True)
    assert records(broken) == records(tmp_path / "unbroken")
    assert same_export(export, unbroken)
    last = [list_states(tmp_path / name / "checkpoints")[-1] for name in ("broken", "unbroken")]
    for name in ("model", "average", "optimizer-0"):
        ours, theirs = (load_file(state / f"{name}.safetensors") for state in last)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_from_an_older_checkpoint_repeats_the_rest(base_recipe, tmp_path, optimizer):
    overrides = [f"optim.name={optimizer}", "loop.keep_checkpoints=9", "optim.schedule=cosine"]
    export = run(base_recipe, *overrides)
    expected, kept = records(tmp_path / "run"), shutil.copytree(export, tmp_path / "kept")
    states = list_states(tmp_path / "run" / "checkpoints")
    assert [int(p.name[-2:]) for p in states] == [3, 6, 9, 12]
    for state in states[2:]:
        shutil.rmtree(state)
    shutil.rmtree(export)
    run(base_recipe, *overrides, resume=True)
    assert records(tmp_path / "run") == expected
    assert same_export(export, kept)


def test_resuming_a_finished_run_exports_the_same(base_recipe, tmp_path):
    export = run(base_recipe)
    kept = shutil.copytree(export, tmp_path / "kept")
    run(base_recipe, resume=True)
    assert same_export(export, kept)


def test_resume_of_nothing_starts(base_recipe, tmp_path):
    run(base_recipe, "loop.images=16", resume=True)
    assert len(records(tmp_path / "run")) == 1


def test_only_the_newest_checkpoints_are_kept(base_recipe, tmp_path):
    run(base_recipe)
    names = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000009", "step-00000012"]


def test_an_existing_run_is_refused_and_untouched(base_recipe, tmp_path):
    run(base_recipe, "loop.images=32")
    before = snapshot(tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"run' holds a run already; resume it, or name"):
        run(base_recipe, "loop.images=32")
    with pytest.raises(ValueError, match="started with another recipe; resuming needs the same"):
        run(base_recipe, "loop.images=32", "optim.lr=1e-5", resume=True)
    with pytest.raises(FileExistsError):
        check_output(load_recipe(base_recipe, ["optim.lr=1e-5"]), resume=False)
    assert snapshot(tmp_path / "run") == before


class Exploding(BaseTask):
    """Its loss is NaN from the third step on."""

    steps = 0

    def loss(self, *args):
        self.steps += 1
        value = super().loss(*args)
        return value * float("nan") if self.steps >= 3 else value


def test_a_loss_that_is_not_finite_stops_the_run(base_recipe, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        run(base_recipe, task=Exploding)
    assert len(records(tmp_path / "run")) == 2


def test_no_checkpoint_holds_nan(base_recipe, tmp_path):
    """Checkpoints between two log lines: `train` promises the last one is untouched."""
    with pytest.raises(FloatingPointError, match="the last checkpoint is untouched"):
        run(base_recipe, "loop.log_every=6", "loop.checkpoint_every=2", task=Exploding)
    for state in list_states(tmp_path / "run" / "checkpoints"):
        for value in load_file(state / "model.safetensors").values():
            assert value.isfinite().all(), state.name


@pytest.fixture
def parts():
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    optimizers = build_optimizers(module, OptimConfig())
    module(torch.randn(4, 3)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    average = WeightAverage(module, 0.9)
    average.update(module)
    return module, optimizers, average


def test_state_round_trip(parts, tmp_path):
    module, optimizers, average = parts
    path = save_state(tmp_path, 5, module, optimizers, average, {"seconds": 1.5}, keep=2)
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    moments = optimizers[0].state_dict()["state"][0]["exp_avg"].clone()
    averaged = {name: value.clone() for name, value in average.average.items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        for value in average.average.values():
            value.zero_()
    optimizers[0].state_dict()["state"][0]["exp_avg"].zero_()
    facts = load_state(path, module, optimizers, average)
    assert (facts["step"], facts["seconds"], average.updates) == (5, 1.5, 1)
    assert all(torch.equal(p, weights[name]) for name, p in module.named_parameters())
    assert all(torch.equal(value, averaged[name]) for name, value in average.average.items())
    assert torch.equal(optimizers[0].state_dict()["state"][0]["exp_avg"], moments)


def test_a_checkpoint_that_failed_is_never_listed(parts, tmp_path):
    assert list_states(tmp_path / "nothing") == []
    good = save_state(tmp_path, 5, *parts, {}, keep=2)
    with pytest.raises(TypeError):
        save_state(tmp_path, 6, *parts, {"seconds": object()}, keep=2)
    assert list_states(tmp_path) == [good]
    again = save_state(tmp_path, 6, *parts, {}, keep=1)  # over the remains
    assert list_states(tmp_path) == [again]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000006"]


def test_a_checkpoint_of_other_parameters_is_refused(parts, tmp_path):
    path = save_state(tmp_path, 5, *parts, {}, keep=2)
    other = torch.nn.Bilinear(3, 2, 4)
    with pytest.raises(ValueError, match="holds other parameters than this recipe trains"):
        load_state(path, torch.nn.Sequential(other), parts[1], WeightAverage(other, 0.9))


def test_average_is_of_the_weights_seen():
    module = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(module, 0.9)
    start, expected = module.weight.item(), module.weight.item()
    for n in range(1, 6):
        with torch.no_grad():
            module.weight.fill_(start + n)
        average.update(module)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (start + n)
    average.copy_to(module)
    assert module.weight.item() == pytest.approx(expected)


def test_nothing_to_train_is_refused():
    module = torch.nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train: no parameter requires a gradient"):
        build_optimizers(module, OptimConfig())


def test_each_parameter_has_one_optimizer(make_model):
    model = make_model()
    for name, count in (("adamw", 1), ("muon", 2)):
        optimizers = build_optimizers(model, OptimConfig(name=name))
        assert len(optimizers) == count
        taken = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(taken) == sorted(id(p) for p in model.parameters())
    assert all(p.ndim == 2 for g in optimizers[0].param_groups for p in g["params"])


def test_tasks_by_name(base_recipe):
    assert set(TASKS) == {"base", "adapter", "width", "classifier"}
    assert isinstance(build_task(load_recipe(base_recipe)), BaseTask)
    text = base_recipe.read_text().replace('"base"', '"sculpture"').replace("[base]", "[sculpture]")
    base_recipe.write_text(text)
    with pytest.raises(ValueError, match="'sculpture'; legal: base, adapter, width, classifier"):
        build_task(load_recipe(base_recipe))
