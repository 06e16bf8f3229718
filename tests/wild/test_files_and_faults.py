"""Files that are links, damaged, foreign or huge: named, nothing lost, the last good state used."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.wild.bounded import bounded

from ditdial import (
    Adapter,
    Calibration,
    DDiT,
    DyDiT,
    FlexiDiT,
    PPFlow,
    SparseDiT,
    elastify,
)
from ditdial.adapter import CONFIG, WEIGHTS
from ditdial.measure.provenance import write_results
from ditdial.training.config import load_recipe

REFUSALS = ("ValueError", "FileExistsError", "FileNotFoundError", "RuntimeError")


@pytest.fixture
def adapter(make_elastic):
    """A small adapter."""
    return make_elastic(scales=(2,)).adapter(take="first")


@pytest.fixture
def again(make_elastic):
    """Another one, to be saved over it."""
    return make_elastic(scales=(2,)).adapter(take="second")


def assert_saved_or_refused(outcome, folder):
    """Saved whole, or refused by name with the first one as it was."""
    if outcome.kind == "done":
        assert Adapter.from_pretrained(folder).notes == {"take": "second"}
    else:
        assert outcome.kind == "error", outcome
        assert outcome.error in REFUSALS, outcome
        assert folder.name in outcome.text or "link" in outcome.text
        assert Adapter.from_pretrained(folder).notes == {"take": "first"}


# Links


def test_saving_over_an_adapter_with_a_link_to_its_parent_copies_nothing_through_it(
    adapter, again, tmp_path
):
    folder = adapter.save_pretrained(tmp_path / "many" / "adapter")
    (folder / "up").symlink_to("..", target_is_directory=True)
    outcome = bounded(lambda: again.save_pretrained(folder) and None, seconds=5, folder=tmp_path)
    assert_saved_or_refused(outcome, folder)
    assert (folder / "up").is_symlink()
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_saving_over_the_present_folder_does_not_copy_itself(adapter, again, tmp_path):
    folder = adapter.save_pretrained(tmp_path / "adapter")
    (folder / "card.md").write_text("mine")

    def save_here():
        os.chdir(folder)
        again.save_pretrained(".")

    outcome = bounded(save_here, seconds=5, folder=tmp_path)
    assert_saved_or_refused(outcome, folder)
    assert (folder / "card.md").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS, "card.md", CONFIG]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_beside_an_adapter_stays_a_link(adapter, again, tmp_path, kind):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "private.txt").write_text("private")
    folder = adapter.save_pretrained(tmp_path / "adapter")
    target = outside / "private.txt" if kind == "file" else outside
    (folder / "linked").symlink_to(target, target_is_directory=kind == "folder")
    again.save_pretrained(folder)
    assert Adapter.from_pretrained(folder).notes == {"take": "second"}
    assert (folder / "linked").is_symlink()
    assert (outside / "private.txt").read_text() == "private"


def small_calibration(adapter):
    """A calibration of two levels for an adapter of one coarse mode."""
    facts = {
        "base": adapter.base,
        "method": {"name": adapter.method.name, "settings": adapter.method.to_config()},
        "guidance_scale": 2.0,
        "choices": [
            {"mode": name, "guide": None, "guidance": "cfg", "gain": 1.0}
            for name in ("full", "patch2")
        ],
        "noise": [0.0, 0.5, 1.0],
        "points": [
            {"level": level, "step_error": [0.0, 0.1], "branch_error": [0.0, 0.1]}
            for level in (0.9, 0.1)
        ],
        "bands": [],
        "seconds": [],
    }
    return Calibration.from_json(json.dumps({"format": 1, **facts}))


def test_the_small_calibration_is_one_that_an_adapter_takes(adapter, tmp_path):
    calibration = small_calibration(adapter)
    assert Calibration.load(calibration.save(tmp_path)) == calibration


@pytest.mark.parametrize("what", ["calibration", "results"])
def test_a_link_with_the_name_of_a_partial_file_is_not_written_through(adapter, tmp_path, what):
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    name = "calibration.json" if what == "calibration" else "results.json"
    (folder / f".{name}.partial").symlink_to(precious)
    if what == "calibration":
        small_calibration(adapter).save(folder)
    else:
        write_results(folder / name, {"rows": []})
    assert precious.read_text() == "precious"
    assert json.loads((folder / name).read_text())


# Adapters


def test_a_rank_that_the_weights_do_not_have_is_refused_before_it_takes_memory(
    adapter, make_model, tmp_path
):
    folder = adapter.save_pretrained(tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    config["settings"]["rank"] = 1_000_000
    (folder / CONFIG).write_text(json.dumps(config))
    model = make_model()
    outcome = bounded(lambda: elastify(model, folder) and None, memory=2**28)
    assert (outcome.kind, outcome.error) == ("error", "ValueError"), outcome
    assert "rank" in outcome.text or "shape" in outcome.text


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool])
def test_an_adapter_of_whole_numbers_is_refused(adapter, make_model, tmp_path, dtype):
    folder = adapter.save_pretrained(tmp_path / "adapter")
    tensors = {name: value.to(dtype) for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
        elastify(make_model(), folder)


def test_an_adapter_is_not_saved_as_whole_numbers(adapter, tmp_path):
    with pytest.raises(ValueError, match="int32"):
        adapter.save_pretrained(tmp_path / "adapter", dtype=torch.int32)
    assert not (tmp_path / "adapter").exists()


METHODS = {
    "flexidit": (FlexiDiT, {"scales": (2,), "rank": 2}),
    "shared": (FlexiDiT, {"scales": (2,), "recipe": "shared"}),
    "ddit": (DDiT, {"scales": (2,), "rank": 2}),
    "ppflow": (PPFlow, {}),
    "experts": (DyDiT, {"recipe": "td-lora", "rank": 2, "scales": (2,)}),
    "sparsedit": (
        SparseDiT,
        {"pool": 0, "modules": 1, "group": (1, 0, 1, 0), "top": 0, "stages": ((0.5, 3),)}
        | {"recipe": "lora"},
    ),
}


def large(settings):
    """Each number in the settings of a method, made large."""
    for name, value in settings.items():
        if type(value) is int and value:
            yield name, 10**7
        elif isinstance(value, list) and value and type(value[0]) is int:
            yield name, [10**4, *value[1:]]


@pytest.mark.parametrize("name", METHODS)
def test_no_number_of_a_config_takes_memory_before_it_is_refused(make_model, tmp_path, name):
    method, settings = METHODS[name]
    adapter = elastify(make_model(), method(**settings)).adapter()
    folder = adapter.save_pretrained(tmp_path / "adapter")
    config, model = json.loads((folder / CONFIG).read_text()), make_model()
    tried = list(large(config["settings"]))
    for field, value in tried:
        changed = {**config, "settings": {**config["settings"], field: value}}
        (folder / CONFIG).write_text(json.dumps(changed))
        outcome = bounded(lambda: elastify(model, folder) and None, memory=2**28, seconds=10)
        unused = outcome.kind == "done" and field in ("rank", "underlying", "experts")
        assert unused or (outcome.kind, outcome.error) == ("error", "ValueError"), (field, outcome)
    assert tried or name == "ppflow"


def test_positions_are_no_weights_and_stay_whole(make_model, tmp_path):
    adapter = elastify(make_model(), DyDiT()).adapter()
    folder = adapter.save_pretrained(tmp_path / "adapter", dtype=torch.float16)
    stored = load_file(folder / WEIGHTS)
    assert {stored[f"elastic.heads_{block}"].dtype for block in (0, 1)} == {torch.int64}
    assert {stored[name].dtype for name in stored if name.startswith("base.")} == {torch.float16}
    elastify(make_model(), folder)


@pytest.mark.parametrize(
    ("tensor", "number"),
    [
        ("elastic.heads_0", 2),
        ("elastic.channels_1", -1),
        ("elastic.routers.width50.token_shares", 1.5),
    ],
)
def test_positions_and_shares_out_of_range_are_refused(make_model, tmp_path, tensor, number):
    adapter = elastify(make_model(), DyDiT()).adapter()
    folder = adapter.save_pretrained(tmp_path / "adapter")
    tensors = load_file(folder / WEIGHTS)
    tensors[tensor].view(-1)[0] = number
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{tensor.rpartition('.')[2]} holds {number}; legal: 0"):
        elastify(make_model(), folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_could_not_be_loaded_again_is_not_saved(adapter, again, tmp_path, value):
    folder = adapter.save_pretrained(tmp_path / "adapter")
    next(iter(again.tensors.values())).data.view(-1)[0] = value
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        again.save_pretrained(folder)
    assert Adapter.from_pretrained(folder).notes == {"take": "first"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_a_dtype_that_loses_weights_is_refused(adapter, tmp_path, dtype):
    with pytest.raises(ValueError, match=f"dtype = {dtype} .*legal: None, or one of 16 bits"):
        adapter.save_pretrained(tmp_path / "adapter", dtype=dtype)


def test_numbers_too_large_for_a_dtype_are_not_saved_as_infinity(adapter, tmp_path):
    next(iter(adapter.tensors.values())).data.view(-1)[0] = 1e6
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        adapter.save_pretrained(tmp_path / "adapter", dtype=torch.float16)
    assert not (tmp_path / "adapter").exists()


def test_a_calibration_in_a_folder_that_is_not_there_has_its_usual_name(adapter, tmp_path):
    path = small_calibration(adapter).save(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "calibration.json"
    assert Calibration.load(tmp_path / "new" / "folder") == small_calibration(adapter)


DEEP = "[" * 100_000


@pytest.mark.parametrize("reader", ["adapter", "calibration", "schedule", "recipe"])
def test_a_deeply_nested_file_is_refused_by_name(adapter, tmp_path, reader):
    from ditdial import Schedule

    file = tmp_path / f"deep-{reader}.json"
    file.write_text(f"a = {DEEP}" if reader == "recipe" else DEEP)
    folder = adapter.save_pretrained(tmp_path / "adapter")
    (folder / CONFIG).write_text(DEEP)
    read = {
        "adapter": lambda: Adapter.from_pretrained(folder),
        "calibration": lambda: Calibration.load(file),
        "schedule": lambda: Schedule.from_json(file.read_text()),
        "recipe": lambda: load_recipe(file),
    }
    words = {"adapter": "config.json", "schedule": "schedule"}.get(reader, file.name)
    with pytest.raises(ValueError, match=words):
        read[reader]()


def test_an_adapter_of_a_method_holds_its_own_sizes(adapter):
    """What the faults above start from."""
    assert isinstance(adapter, Adapter)
    assert adapter.method == FlexiDiT(rank=4, scales=(2,))
