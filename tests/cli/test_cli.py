"""The command line: figures as JSON, and bad input ends with exit code 2 and a clear line."""

from __future__ import annotations

import json

import pytest

from ditdial.backbones import BACKBONES
from ditdial.cli.app import error_text, main
from ditdial.cli.arguments import parse_labels
from ditdial.methods import METHODS


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["ditdial", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_cost_json(monkeypatch, capsys):
    code, out, _ = run(
        monkeypatch, capsys, "cost", "--model", "dit-xl-2-256", "--weak-fraction", "0.48", "--json"
    )
    facts = json.loads(out)
    assert code == 0
    assert facts["macs_full"] == pytest.approx(118.67e9, rel=1e-4)
    assert facts["ratio"] == pytest.approx(0.64, abs=0.005)
    assert facts["macs_plan"] == pytest.approx(facts["ratio"] * facts["macs_full"])


def test_cost_of_the_reference_model(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "cost", "--model", "mnist", "--json")
    assert code == 0
    assert json.loads(out)["tokens"]["full"] == 64


def test_methods_tell_what_runs_what_is_trained_and_what_is_published(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert list(rows) == list(METHODS)
    assert rows["dydit"]["runs_on"] == [n for n, b in BACKBONES.items() if b.routed]
    assert rows["sparsedit"]["runs_on"] == [n for n, b in BACKBONES.items() if b.streamed]
    assert rows["ddit"]["runs_on"] == list(BACKBONES)
    assert rows["flexidit"]["trained"] == ["lora", "shared"]
    assert rows["combined"]["trained"] == []
    assert all("arXiv" in row["paper"] for name, row in rows.items() if name != "combined")


def test_backbones_tell_the_modes_that_run(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "backbones", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert list(rows) == list(BACKBONES)
    assert [name for name, row in rows.items() if row["trained"]] == ["DiTTransformer2DModel"]
    wan = rows["WanTransformer3DModel"]
    assert (wan["patch"], wan["sparse"], wan["routed"]) == (["t", "h", "w"], True, True)
    assert wan["models"] == ["wan-2.1-1.3b-480p", "wan-2.1-14b-720p"]
    lumina = rows["Lumina2Transformer2DModel"]
    assert [lumina[key] for key in ("sparse", "routed", "packed")] == [False, False, False]


def test_sample_and_report(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "pictures"
    code, _, err = run(
        monkeypatch,
        capsys,
        *("sample", str(folder), "--labels", "3,7-8", "--budget", "0.5", "--steps", "4"),
    )
    assert code == 0, err
    assert sorted(p.name for p in folder.glob("*.png")) == [
        "class3-seed0.png",
        "class7-seed1.png",
        "class8-seed2.png",
        "decisions.png",
    ]
    code, out, _ = run(monkeypatch, capsys, "report", str(folder / "report.json"), "--json")
    assert code == 0
    assert len(json.loads(out)["calls"]) == 4


def test_sample_with_a_threshold_keeps_the_budget_as_its_cap(monkeypatch, capsys, tmp_path):
    asked = ("sample", str(tmp_path / "out"), "--labels", "3,7", "--steps", "6", "--tau", "0")
    code, _, err = run(monkeypatch, capsys, *asked, "--budget", "0.7", "--adapter", "ddit")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0.6 < report["ratio"] <= 0.7
    assert {call["mode"] for call in report["calls"]} > {"full"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cost", "--model", "dit-xxl"], ["dit-xxl", "dit-xl-2-256"]),
        (["cost", "--model", "dit-xl-2-256", "--weak-fraction", "1.5"], ["1.5", "[0, 1]"]),
        (["cost", "--model", "dit-xl-2-256", "--steps", "0"], ["steps = 0", ">= 1"]),
        (["sample", "nowhere", "--budget", "0"], ["budget = 0", "(0, 1]"]),
        (["sample", "nowhere", "--budget", "1.2"], ["budget = 1.2", "(0, 1]"]),
        (["sample", "nowhere", "--budget", "0.01"], ["0.01", "cheapest"]),
        (["sample", "nowhere", "--tau", "-1"], ["tau = -1", ">= 0"]),
        (["sample", "nowhere", "--tau", "1", "--steps", "3"], ["3 steps", "more than 3"]),
        (["sample", "nowhere", "--tau", "1", "--budget", "0.01"], ["cap = 0.01", "cheapest"]),
        (["sample", "nowhere", "--labels", "3,x"], ["3,x", "legal"]),
        (["sample", "nowhere", "--labels", "12"], ["12", "0..9"]),
        (["sample", "nowhere", "--adapter", "other"], ["other", "lora"]),
        (["sample", "nowhere", "--adapter", "no/such/folder"], ["no/such/folder"]),
        (["sample", "nowhere", "--model", "cifar100"], ["cifar100", "mnist"]),
        (["train", "no-recipe.toml"], ["no-recipe.toml", "does not exist"]),
        (["report", "no-report.json"], ["no-report.json"]),
        (["demo", "--images", "8"], ["images = 8", ">= 80"]),
        (["cost", "--model", "dit-xl-2-265"], ["(did you mean 'dit-xl-2-256'?)"]),
        (["cost", "--model", "mnist", "--method", "sparsdit"], ["(did you mean 'sparsedit'?)"]),
        (["probe", "FluxTransformer3DModel"], ["(did you mean 'FluxTransformer2DModel'?)"]),
        (["sample", "nowhere", "--adapter", "sharde"], ["(did you mean 'shared'?)"]),
        (["sample", "nowhere", "--model", "mnits"], ["(did you mean 'mnist'?)"]),
        (["methds"], ["Did you mean 'methods'?"]),
    ],
)
def test_bad_input_ends_with_2_and_writes_nothing(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([("full", 1, 0.6), ("patch2", 0.5, 0)], ["gap", "0.6", "0.5"]),
        ([("patch3", 1, 0)], ["patch3", "legal", "patch2"]),
        ([("tiny", 1, 0)], ["tiny", "legal"]),
        ([("full", 0.9, 0)], ["0.9", "legal: 1 to 0"]),
    ],
)
@pytest.mark.parametrize("command", [["sample", "nowhere"], ["eval", "--output", "nowhere.json"]])
def test_a_bad_schedule_is_refused(monkeypatch, capsys, tmp_path, command, segments, words):
    monkeypatch.chdir(tmp_path)
    rows = [{"mode": mode, "start": start, "stop": stop} for mode, start, stop in segments]
    (tmp_path / "schedule.json").write_text(json.dumps({"segments": rows}))
    code, _, err = run(monkeypatch, capsys, *command, "--schedule", "schedule.json")
    assert code == 2
    assert all(word in err for word in words), err
    assert [p.name for p in tmp_path.iterdir()] == ["schedule.json"]


def test_a_good_schedule_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.json").write_text(
        '{"segments": [{"mode": "patch4", "start": 1, "stop": 0.5}, '
        '{"mode": "full", "start": 0.5, "stop": 0}]}'
    )
    arguments = ("sample", "pictures", "--labels", "1", "--steps", "4", "--schedule", "s.json")
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 0, err
    calls = json.loads((tmp_path / "pictures" / "report.json").read_text())["calls"]
    assert [call["mode"] for call in calls] == ["patch4", "patch4", "full", "full"]


def test_a_broken_picture_is_named_before_training(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for label in ("one", "zero"):
        folder = tmp_path / "data" / "train" / label
        folder.mkdir(parents=True)
        (folder / f"{label}.png").write_bytes(b"no picture")
    (tmp_path / "r.toml").write_text(
        'task = "base"\noutput = "run"\n[data]\npath = "./data"\n[loop]\nimages = 4\n'
        "[base]\nnum_layers = 1\nnum_attention_heads = 1\nattention_head_dim = 8\n"
        "patch_size = 8\nnum_classes = 10\n"
    )
    code, _, err = run(monkeypatch, capsys, "train", "r.toml")
    assert code == 2
    assert "one.png" in err
    assert "row 0" in err
    assert not (tmp_path / "run").exists()


def test_a_run_in_the_way_is_not_overwritten(monkeypatch, capsys, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('task = "base"\n[data]\npath = "./none"\n[loop]\nimages = 4\n')
    output = tmp_path / "run"
    output.mkdir()
    (output / "recipe.json").write_text("precious")
    code, _, err = run(monkeypatch, capsys, "train", str(recipe), "--output", str(output))
    assert code == 2
    assert "holds a run already" in err
    assert (output / "recipe.json").read_text() == "precious"


@pytest.mark.parametrize("text", ["[optim] is lost", "no [/x] here", ":smile: [bold]"])
def test_errors_are_printed_as_they_are(monkeypatch, capsys, text):
    """Brackets and colons are markup to the printer: one vanished, another crashed it."""
    code, out, err = run(monkeypatch, capsys, "report", text)
    assert code == 2
    assert err == f"error: report {text!r} does not exist\n"
    assert out == ""


def test_a_recipes_table_is_named_in_an_error(monkeypatch, capsys, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('task = "base"\n[data]\npath = "x"\n[loop]\nimages = 4\n[optim]\nlrr = 1\n')
    code, _, err = run(monkeypatch, capsys, "train", str(recipe))
    assert code == 2
    assert err.startswith("error: [optim] has no key 'lrr'; legal keys: beta2")
    assert err.endswith("(did you mean 'lr'?)\n")


def test_paths_with_brackets_are_printed_as_they_are(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "[red]pictures"
    code, out, err = run(
        monkeypatch, capsys, "sample", str(folder), "--labels", "1", "--steps", "2"
    )
    assert code == 0, err
    assert out.endswith(f"of the full cost: {folder}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "folder"], "Is a directory: 'folder'"),
        (["train", "folder"], "Is a directory: 'folder'"),
        (["sample", "out", "--schedule", "folder"], "Is a directory: 'folder'"),
        (["eval", "--output", "folder"], "Is a directory: 'folder'"),
        (["eval", "--output", "file/below/eval.json"], "Not a directory: "),
        (["calibrate", "--output", "folder"], "Is a directory: 'folder'"),
        (["sample", "file"], "Not a directory: "),
        (["demo", "--output", "file/below"], "Not a directory: "),
        (["report", "file/below.json"], "report 'file/below.json' does not exist"),
    ],
)
def test_a_wrong_place_ends_in_one_line_before_any_work(
    monkeypatch, capsys, tmp_path, arguments, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("precious")
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {words}")
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_link_in_the_place_of_a_report_is_replaced(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "mine.json").write_text("mine")
    (folder / "report.json").symlink_to(tmp_path / "mine.json")
    asked = ("sample", str(folder), "--labels", "1", "--steps", "2")
    assert run(monkeypatch, capsys, *asked)[0] == 0
    assert (tmp_path / "mine.json").read_text() == "mine"
    assert not (folder / "report.json").is_symlink()


def test_errors_of_the_system_are_one_line():
    assert error_text(PermissionError(13, "Permission denied", "/x")) == "Permission denied: '/x'"
    assert error_text(OSError("several\n  lines")) == "several lines"
    assert error_text(ValueError("as\nit is")) == "as it is"
    assert error_text(ValueError("\x1b[31mred\x07 ä")) == r"\x1b[31mred\x07 ä"


def test_parse_labels():
    assert parse_labels("0,3,5-7") == [0, 3, 5, 6, 7]
