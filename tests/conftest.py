"""Shared fixtures: tiny real models with nothing left at zero, calls for them, tiny data sets."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ditdial import FlexiDiT, elastify
from ditdial.handle import Handle
from ditdial.measure.memory import keep_freed_memory
from ditdial.plan.execution import Execution
from ditdial.runtime.tensors import is_new
from ditdial.training.state import list_states

keep_freed_memory()  # as the command line does

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 1,
    "num_layers": 2,
    "sample_size": 32,
    "patch_size": 4,
    "num_embeds_ada_norm": 10,
}


@torch.no_grad()
def _perturb(module: nn.Module, keep: Callable[[str], bool] | None = None, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if keep is None or keep(name):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def perturb() -> Callable[..., None]:
    """``perturb(module, keep)``: noise on all parameters (whose name ``keep`` accepts)."""
    return _perturb


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """``make_model(**changes)``: a tiny DiT with noise on every parameter, the same each time."""

    def make(**changes: Any) -> Any:
        torch.manual_seed(0)
        model = DiTTransformer2DModel(**{**TINY, **changes}).eval()
        _perturb(model)
        return model

    return make


@pytest.fixture
def model(make_model) -> Any:
    """A tiny DiT: 32x32 pixels, an 8x8 grid, width 32, 10 classes."""
    return make_model()


@pytest.fixture(scope="session")
def make_elastic(make_model) -> Callable[..., Handle]:
    """``make_elastic(target=None, merge=False, **method)``: elastic, with noise on the new tensors.

    The underlying weights of the shared recipe keep their start, so that they still give the base.
    """

    def make(target: Any = None, *, merge: bool = False, **method: Any) -> Handle:
        target = make_model() if target is None else target
        torch.manual_seed(2)
        handle = elastify(
            target,
            FlexiDiT(**{"rank": 4, **method}),
            execution=Execution(merge=merge),
        )
        _perturb(handle.model, lambda name: is_new(name) and "flex_" not in name, seed=3)
        return handle

    return make


@pytest.fixture(scope="session")
def make_call() -> Callable[..., dict[str, Any]]:
    """``make_call(count, time, guided)``: arguments of one model call; guided doubles the rows."""

    def make(
        count: int = 2, time: float = 500.0, *, guided: bool = False, side: int = 32, null: int = 10
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(count, 1, side, side, generator=generator)
        labels = torch.arange(1, count + 1)
        if guided:
            x, labels = torch.cat([x, x]), torch.cat([labels, torch.full((count,), null)])
        times = torch.full((len(x),), float(time))
        return {"hidden_states": x, "timestep": times, "class_labels": labels}

    return make


@pytest.fixture(scope="session")
def output() -> Callable[..., Tensor]:
    """``output(model, call)``: the prediction, without gradients."""

    @torch.no_grad()
    def run(model: Any, call: dict[str, Any]) -> Tensor:
        return model(**call).sample

    return run


@pytest.fixture(scope="session")
def assert_stock() -> Callable[[Any, Any], None]:
    """``assert_stock(model, stock)``: same state, classes and attributes as an untouched twin."""

    def check(model: Any, stock: Any) -> None:
        state, expected = model.state_dict(), stock.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        ours, theirs = dict(model.named_modules()), dict(stock.named_modules())
        assert {n: type(m) for n, m in ours.items()} == {n: type(m) for n, m in theirs.items()}
        for name, module in theirs.items():
            assert set(vars(ours[name])) == set(vars(module)), name

    return check


def png(pixels: np.ndarray) -> bytes:
    """One picture as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def write_parquet(monkeypatch, tmp_path) -> Callable[..., Path]:
    """``write_parquet(folder, encoded, labels)``: one split of encoded pictures."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    datasets.disable_progress_bars()

    def write(folder: Path, encoded: list[bytes], labels: list[int], split: str = "train") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        items = {"image": [{"bytes": x, "path": None} for x in encoded], "label": labels}
        datasets.Dataset.from_dict(items, features=features).to_parquet(folder / f"{split}.parquet")
        return folder

    return write


@pytest.fixture
def stripes(write_parquet, tmp_path) -> Path:
    """A folder of 32 noisy 16x16 pictures: class 0 lies, class 1 stands."""
    generator = np.random.default_rng(0)
    encoded, labels = [], []
    for index in range(32):
        lying = np.tile((np.arange(16) // 4 % 2 * 180)[:, None], (1, 16))
        pixels = (lying.T if index % 2 else lying) + generator.integers(0, 60, (16, 16))
        encoded.append(png(pixels.astype(np.uint8)))
        labels.append(index % 2)
    return write_parquet(tmp_path / "stripes", encoded, labels)


BASE_RECIPE = """
task = "base"
output = "{folder}/run"

[data]
path = "{data}"
image_size = 16
channels = 1
mean = 0.4
std = 0.35

[base]
num_layers = 2
num_attention_heads = 2
attention_head_dim = 16
patch_size = 4
num_classes = 2

[optim]
lr = 3e-3
warmup_steps = 2
ema_decay = 0.5

[loop]
images = 192
batch_size = 16
log_every = 1
checkpoint_every = 3
keep_checkpoints = 2
"""


@pytest.fixture
def base_recipe(stripes, tmp_path) -> Path:
    """The file of a recipe that trains a tiny base for 12 steps."""
    path = tmp_path / "base.toml"
    path.write_text(BASE_RECIPE.format(folder=tmp_path, data=stripes))
    return path


ADAPTER_RECIPE = """
task = "adapter"
output = "{folder}/adapter-run"

[data]
path = "{data}"
image_size = 16
channels = 1
mean = 0.4
std = 0.35

[adapter]
base = "{folder}/base"
scales = [2, 4]
min_levels = [0.0, 0.4]
rank = 4

[optim]
lr = 3e-3
warmup_steps = 2
ema_decay = 0.5

[loop]
images = 320
batch_size = 16
log_every = 1
checkpoint_every = 8
keep_checkpoints = 5
"""


WIDTH_TABLE = """
[width]
base = "{folder}/base"
widths = [0.7, 0.5]
groups = 4
head_bias = 1.0
token_bias = 1.0
"""


@pytest.fixture
def adapter_recipe(stripes, make_model, tmp_path) -> Path:
    """The file of a recipe that trains an adapter of a tiny base (saved beside it) for 20 steps."""
    make_model(sample_size=16, num_embeds_ada_norm=2).save_pretrained(tmp_path / "base")
    path = tmp_path / "adapter.toml"
    path.write_text(ADAPTER_RECIPE.format(folder=tmp_path, data=stripes))
    return path


@pytest.fixture
def recipe_with(adapter_recipe, tmp_path) -> Callable[..., Path]:
    """``recipe_with(task, table)``: that recipe with another table in place of ``[adapter]``."""

    def make(task: str, table: str) -> Path:
        text = adapter_recipe.read_text().replace('task = "adapter"', f'task = "{task}"')
        before, after = text.split("[adapter]")[0], text[text.index("[optim]") :]
        path = tmp_path / f"{task}-recipe.toml"
        path.write_text(before + table.format(folder=tmp_path) + after)
        return path

    return make


@pytest.fixture
def width_recipe(recipe_with) -> Path:
    """The file of a recipe that trains routed widths of the tiny base for 20 steps."""
    return recipe_with("width", WIDTH_TABLE)


@pytest.fixture
def losses(tmp_path) -> Callable[[], list[float]]:
    """``losses()``: of every step of the run in ``adapter-run``."""

    def read() -> list[float]:
        lines = (tmp_path / "adapter-run" / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    return read


@pytest.fixture
def assert_resumes(tmp_path, losses) -> Callable[..., None]:
    """``assert_resumes(run, *overrides)``: a run taken up at its first checkpoint repeats itself.

    ``run(*overrides, resume=False)`` returns a task and its adapter folder.
    """

    def check(run: Callable[..., Any], *overrides: str) -> None:
        _, export = run(*overrides)
        expected, kept = losses(), load_file(export / "adapter.safetensors")
        for state in list_states(tmp_path / "adapter-run" / "checkpoints")[1:]:
            shutil.rmtree(state)
        shutil.rmtree(export)
        run(*overrides, resume=True)
        assert losses() == expected
        again = load_file(export / "adapter.safetensors")
        assert again.keys() == kept.keys()
        assert all(torch.equal(again[name], kept[name]) for name in kept)

    return check
