"""Adapter folders: a round trip keeps every number; a bad file never reaches a model."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditdial import Adapter, FlexiDiT, Mode, Schedule, elastify
from ditdial.adapter import CONFIG, WEIGHTS, check_base

both_recipes = pytest.mark.parametrize("recipe", ["lora", "shared"])


@pytest.fixture
def saved(make_elastic, tmp_path):
    """A sound adapter folder, to be damaged."""
    handle = make_elastic()
    handle.schedule = Schedule.weak_first(0.4)
    return handle.adapter(scale=2.5).save_pretrained(tmp_path / "adapter")


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@both_recipes
def test_round_trip(make_model, make_elastic, make_call, output, perturb, tmp_path, recipe):
    handle, call = make_elastic(recipe=recipe), make_call(2)
    if recipe == "shared":  # a trained one: its base weights are its own
        perturb(handle.model, seed=9)
    handle.schedule = Schedule.weak_first(0.4)
    folder = handle.adapter(scale=2.5).save_pretrained(tmp_path / "deep" / "adapter")
    assert sorted(p.name for p in folder.iterdir()) == [WEIGHTS, CONFIG]
    adapter = Adapter.from_pretrained(folder)
    assert adapter.notes == {"scale": 2.5}
    assert adapter.method == handle.method
    again = elastify(make_model(), folder)
    assert again.schedule == handle.schedule
    for mode in handle.modes:
        with handle.using(mode), again.using(mode):
            expected = output(handle.model, call)
            assert torch.equal(output(again.model, call), expected), mode
    ours, theirs = again.adapter().tensors, handle.adapter().tensors
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_lora_adapter_holds_new_tensors_only(saved, make_model):
    stock = set(make_model().state_dict())
    tensors = Adapter.from_pretrained(saved).tensors
    assert not stock & set(tensors)
    assert not any(name.startswith("base.") for name in tensors)


def test_another_schedule_wins_over_the_adapters(saved, make_model):
    assert elastify(make_model(), saved).schedule == Schedule.weak_first(0.4)
    other = Schedule.weak_first(0.1)
    assert elastify(make_model(), saved, schedule=other).schedule == other


def test_a_narrower_dtype_is_half_as_large_and_close(
    make_elastic, make_model, make_call, output, tmp_path
):
    handle, call = make_elastic(), make_call(2)
    full = handle.adapter().save_pretrained(tmp_path / "full")
    half = handle.adapter().save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in Adapter.from_pretrained(half).tensors.values())
    assert (half / WEIGHTS).stat().st_size < 0.6 * (full / WEIGHTS).stat().st_size
    again = elastify(make_model(), half)
    with handle.using(Mode(2)), again.using(Mode(2)):
        expected, found = output(handle.model, call), output(again.model, call)
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


def test_saving_replaces_an_adapter(saved, make_elastic):
    make_elastic(scales=(2,)).adapter(new=True).save_pretrained(saved)
    assert Adapter.from_pretrained(saved).notes == {"new": True}
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_saving_into_an_empty_folder(make_elastic, tmp_path):
    (tmp_path / "empty").mkdir()
    Adapter.from_pretrained(make_elastic().adapter().save_pretrained(tmp_path / "empty"))


def test_saving_over_something_else_is_refused(make_elastic, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="thesis' exists and holds no adapter"):
        make_elastic().adapter().save_pretrained(folder)
    assert contents(folder) == {"chapter.txt": b"all of it"}


def test_saving_over_a_diffusers_model_is_refused(make_model, make_elastic, tmp_path):
    """A model folder has a ``config.json`` too."""
    folder = tmp_path / "base"
    make_model().save_pretrained(folder)
    before = contents(folder)
    with pytest.raises(FileExistsError, match="base' exists and holds no adapter"):
        make_elastic().adapter().save_pretrained(folder)
    assert contents(folder) == before


def test_saving_onto_a_file_is_refused(make_elastic, tmp_path):
    file = tmp_path / "adapter"
    file.write_text("mine")
    with pytest.raises(OSError):  # noqa: PT011
        make_elastic().adapter().save_pretrained(file)
    assert file.read_text() == "mine"


def test_an_adapter_survives_a_failed_save(saved, make_elastic):
    before = contents(saved)
    with pytest.raises(TypeError):
        make_elastic().adapter(thing=object()).save_pretrained(saved)
    assert contents(saved) == before
    Adapter.from_pretrained(saved)


def test_a_failed_save_leaves_no_litter(saved, make_elastic):
    with pytest.raises(TypeError):
        make_elastic().adapter(thing=object()).save_pretrained(saved)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads: adapter 2, this model 4"),
        ({"num_layers": 3}, "num_layers: adapter 2, this model 3"),
        ({"patch_size": 8}, "patch_size: adapter 4, this model 8"),
        ({"in_channels": 3}, "in_channels: adapter 1, this model 3"),
        ({"num_embeds_ada_norm": 1000}, "num_classes: adapter 10, this model 1000"),
    ],
)
def test_an_adapter_of_another_base_is_refused(saved, make_model, changes, words):
    model = make_model(**changes)
    with pytest.raises(ValueError, match=f"made for another base; .*{words}"):
        elastify(model, saved)
    assert type(model).__name__ == "DiTTransformer2DModel"


def test_an_adapter_of_another_class_is_refused(saved, make_model):
    config = json.loads((saved / CONFIG).read_text())
    edit_config(saved, base={**config["base"], "class": "PixArtTransformer2DModel"})
    words = "class: adapter 'PixArtTransformer2DModel', this model 'DiTTransformer2DModel'"
    with pytest.raises(ValueError, match=words):
        elastify(make_model(), saved)


def test_every_differing_fact_is_named():
    adapter = Adapter(method=FlexiDiT(), base={"a": 1, "b": 2}, tensors={})
    with pytest.raises(ValueError, match="a: adapter 1, this model 3; b: adapter 2, this model 4"):
        check_base(adapter, {"a": 3, "b": 4})


def truncated(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def emptied(folder):
    (folder / WEIGHTS).write_bytes(b"")


def no_safetensors(folder):
    (folder / WEIGHTS).write_bytes(pickle.dumps({"a": 1}))


def foreign(folder):
    edit_tensors(folder, lambda _: {"encoder.weight": torch.zeros(2, 2)})


def incomplete(folder):
    edit_tensors(folder, lambda tensors: dict(list(tensors.items())[1:]))


def reshaped(folder):
    edit_tensors(folder, lambda t: {n: v.flatten()[:1].clone() for n, v in t.items()})


def not_a_number(folder):
    first = torch.tensor(0)
    edit_tensors(folder, lambda t: {n: v.index_fill(0, first, torch.nan) for n, v in t.items()})


def infinite(folder):
    edit_tensors(folder, lambda t: {n: v + torch.inf for n, v in t.items()})


def broken_json(folder):
    (folder / CONFIG).write_text('{"format": 1,')


def deep_json(folder):
    (folder / CONFIG).write_text("[" * 100_000 + "]" * 100_000)


def json_list(folder):
    (folder / CONFIG).write_text("[1]")


def another_format(folder):
    edit_config(folder, format=99)


def another_method(folder):
    edit_config(folder, method="toad")


def strange_settings(folder):
    edit_config(folder, settings={"colour": "red"})


def settings_out_of_range(folder):
    edit_config(folder, settings={"rank": -3})


def settings_of_another_type(folder):
    edit_config(folder, settings={"scales": 2})


def fractional_scale(folder):
    edit_config(folder, settings={"scales": [2.5]})


def method_is_a_list(folder):
    edit_config(folder, method=["flexidit"])


def base_is_a_list(folder):
    edit_config(folder, base=[1])


def notes_only_base(folder):
    edit_config(folder, base={})


def broken_schedule(folder):
    edit_config(folder, schedule={"segments": [{"start": 1, "stop": 0.5, "mode": "full"}]})


def schedule_with_another_mode(folder):
    edit_config(folder, schedule={"segments": [{"start": 1, "stop": 0, "mode": "patch8"}]})


def pickled_instead(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "is truncated or no safetensors file"),
        (emptied, "is truncated or no safetensors file"),
        (no_safetensors, "is truncated or no safetensors file"),
        (foreign, r"do not fit .*missing: elastic.* \.\.\.; unknown: encoder.weight"),
        (incomplete, "missing: elastic"),
        (reshaped, r"wrong shape: .* \(1,\) instead of \("),
        (not_a_number, "tensor '.*' holds NaN or infinite values; legal: finite numbers"),
        (infinite, "holds NaN or infinite values"),
        (broken_json, "config.json' is not valid JSON"),
        (deep_json, "config.json' is nested too deeply to be read"),
        (json_list, r"format = \[1\]; legal: 1"),
        (another_format, "format = 99; legal: 1"),
        (another_method, "unknown method 'toad'; legal: flexidit"),
        (strange_settings, "'flexidit' is not understood: .*colour"),
        (settings_out_of_range, "rank = -3; legal: a whole number >= 1"),
        (settings_of_another_type, "'flexidit' is not understood|scales = 2"),
        (fractional_scale, r"scales = \(2.5,\); legal: at least one, all different"),
        (method_is_a_list, "method = .*; legal: a JSON text"),
        (base_is_a_list, "base"),
        (notes_only_base, "another base; class: adapter None"),
        (broken_schedule, "covers noise levels 1 to 0.5; legal: 1 to 0"),
        (schedule_with_another_mode, "asks for patch8; legal for this adapter: full, patch2"),
        (pickled_instead, r"holds pickled weights \['pytorch_model.bin'\]; legal: adapter.safe"),
    ],
)
def test_damage_is_named_and_the_model_untouched(saved, make_model, assert_stock, damage, words):
    damage(saved)
    model = make_model()
    with pytest.raises(ValueError, match=words):
        elastify(model, saved)
    assert_stock(model, make_model())


def test_missing_files_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        Adapter.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="'nowhere' is neither a folder nor a hub id"):
        Adapter.from_pretrained("nowhere")
    shutil.copytree(saved, tmp_path / "b")
    (saved / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json; it is no adapter folder"):
        Adapter.from_pretrained(saved)
    (tmp_path / "b" / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter.safetensors"):
        Adapter.from_pretrained(tmp_path / "b")


@pytest.mark.parametrize("name", ["adapter.bin", "adapter.pt", "model.ckpt", "adapter.pkl"])
def test_a_pickle_is_refused_unread(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"is pickled weights; legal: a folder with config.json"):
        Adapter.from_pretrained(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_lone_file_is_refused(saved):
    with pytest.raises(ValueError, match=r"is a file; legal: a folder with config.json and"):
        Adapter.from_pretrained(saved / WEIGHTS)


def test_an_adapter_folder_survives_being_moved_and_read_only(saved, make_model, tmp_path):
    moved = saved.rename(tmp_path / "elsewhere")
    for path in (*moved.iterdir(), moved):
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        elastify(make_model(), str(moved))
    finally:
        moved.chmod(0o755)
