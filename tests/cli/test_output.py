"""What a person sees: tables of 80 columns with whole figures, and nothing from other libraries."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys

import pytest
from tests.cli.test_cli import run

from ditdial.cli.app import CHATTY, configure_logging
from ditdial.cli.tables import Column, plain, print_table

FIGURE = re.compile(r"\d(e[+-]\d)")


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def lines_of(monkeypatch, capsys, *arguments):
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert code == 0, err
    lines = [line.rstrip() for line in out.splitlines()]
    assert all(len(line) <= 80 for line in lines), lines
    assert "…" not in out
    assert not FIGURE.search(out)
    return lines


def test_the_cost_of_a_run_tells_its_units(monkeypatch, capsys):
    lines = lines_of(monkeypatch, capsys, "cost", "--model", "dit-xl-2-256")
    assert lines[0] == "dit-xl-2-256, per forward pass of one picture or clip:"
    assert re.split("  +", lines[5]) == [
        "mode full",
        "256",
        "118.7 GMACs",
        "237.3 GFLOPs",
        "100.0 %",
    ]
    assert "per run of one picture or clip, 250 guided steps of 2 passes," in lines
    assert "59.3 TMACs" in "".join(lines)  # 118.7 GMACs, twice for guidance, 250 steps
    clip = lines_of(monkeypatch, capsys, "cost", "--model", "wan-2.1-1.3b-480p")
    assert clip[0] == "wan-2.1-1.3b-480p, per forward pass of one picture or clip:"


def test_both_countings_of_sparse_modes_are_shown(monkeypatch, capsys):
    asked = ("cost", "--model", "dit-xl-2-256", "--method", "sparsedit")
    lines = lines_of(monkeypatch, capsys, *asked)
    row = next(line for line in lines if line.startswith("as planned"))
    assert row.split()[-4:] == ["55.1", "%", "57.2", "%"]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("flux-1-dev-1024", "one picture of 1 x 64 x 64 base tokens and 512 of text"),
        ("wan-2.1-14b-720p", "one clip of 21 x 45 x 80 base tokens and 512 of text"),
        ("LatteTransformer3DModel", "no costs: this class has no default config"),
        ("UNet2DModel", "can be made elastic        no"),
    ],
)
def test_probe_is_readable(monkeypatch, capsys, target, words):
    assert words in "\n".join(lines_of(monkeypatch, capsys, "probe", target))


def test_probe_keeps_raw_numbers_as_json(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "probe", "flux-1-dev-1024", "--json")
    facts = json.loads(out)
    assert (facts["class"], facts["supported"]) == ("FluxTransformer2DModel", True)
    assert (facts["grid"], facts["text tokens"]) == ([1, 64, 64], 512)
    assert set(facts["cost"][0]) == {"mode", "tokens", "macs", "ratio"}
    assert facts["cost"][0]["macs"] == pytest.approx(37.19e12, rel=1e-3)


def test_cost_keeps_raw_numbers_as_json(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "cost", "--model", "dit-xl-2-256", "--json")
    facts = json.loads(out)
    assert (facts["model"], facts["method"], facts["steps"]) == ("dit-xl-2-256", "flexidit", 250)
    assert facts["tokens"] == {"full": 256, "patch2": 64}
    assert facts["macs"]["full"] == facts["macs_full"] == pytest.approx(118.7e9, rel=1e-3)
    assert facts["macs_plan"] == pytest.approx(facts["ratio"] * facts["macs_full"])
    assert facts["flops_full"] == 2 * facts["macs_full"]
    assert facts["ratio_blocks"] == pytest.approx(facts["ratio"], rel=2e-3)


CALLS = [
    {"index": 0, "level": 1.0, "branch": None, "mode": "patch2", "guide": "patch2", "rows": 4}
    | {"macs": 82.0e6, "seconds": 0.0177, "pictures": None, "why": []},
    {"index": 1, "level": 0.5, "branch": None, "mode": "full", "guide": None, "rows": 4}
    | {"macs": 207.1e9, "seconds": 75.3, "pictures": None, "why": []},
]


def test_a_report_is_a_line_per_call(monkeypatch, capsys, tmp_path):
    path = tmp_path / "report.json"
    totals = {"macs": 207.2e9, "ratio": 0.639, "seconds": 75.3, "budget": 0.64}
    path.write_text(json.dumps({**totals, "calls": CALLS}))
    lines = lines_of(monkeypatch, capsys, "report", str(path))
    assert lines[0] == "per call of the model:"
    assert lines[5].split()[-4:] == ["82.0", "MMACs", "17.7", "ms"]
    assert lines[6].split() == ["1", "0.500", "full", "-", "4", "207.1", "GMACs", "75.3", "s"]
    assert lines[-2:] == [
        "per run: 63.9 % of the full cost (of 64.0 % allowed),",
        "207.2 GMACs, 75.3 s in the model",
    ]
    _, out, _ = run(monkeypatch, capsys, "report", str(path), "--json")
    assert json.loads(out) == {**totals, "calls": CALLS}


def test_rows_of_results_are_split_where_they_do_not_fit(monkeypatch, capsys, tmp_path):
    row = {"name": "full", "gmacs": 4.15, "ratio": 1.0, "seconds": 44.2, "time_ratio": 1.0}
    row |= {"frechet": 0.909, "frechet_noise": 0.07, "frechet_sets": [1, 2], "new": "anything"}
    row |= {"accuracy": 0.978, "accuracy_noise": 0.005, "psnr": None, "odd": True, "loss": 1e-5}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"rows": [row, row | {"name": "weak 12 of 25", "psnr": 25.2}]}))
    text = "\n".join(lines_of(monkeypatch, capsys, "report", str(path)))
    for words in ("4.15 GMACs", "44.2 s", "0.909 ± 0.0700", "97.8 % ± 0.500 %", "25.2", "anything"):
        assert words in text
    assert text.count("weak 12 of 25") == 2
    assert "0.0000100" in text
    assert "frechet_noise" not in text


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is not valid JSON"), ("[]", "is no report"), ('{"rows": [3]}', "is no report")],
)
def test_what_is_no_report_is_refused(monkeypatch, capsys, tmp_path, content, words):
    path = tmp_path / "report.json"
    path.write_text(content)
    code, _, err = run(monkeypatch, capsys, "report", str(path))
    assert (code, words in err) == (2, True)
    path.write_bytes(b"\xff\xfe\x00")
    code, _, err = run(monkeypatch, capsys, "report", str(path))
    assert (code, str(path) in err, "decode" in err) == (2, True, True)


@pytest.mark.parametrize("kind", ["calls", "rows"])
def test_an_empty_run_is_reported(monkeypatch, capsys, tmp_path, kind):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({kind: []}))
    lines_of(monkeypatch, capsys, "report", str(path))


@pytest.mark.parametrize("command", ["methods", "backbones"])
def test_lists_fit(monkeypatch, capsys, command):
    lines = lines_of(monkeypatch, capsys, command)
    assert not any("works" in line for line in lines)
    assert "trained here" in "\n".join(lines)


def test_a_table_breaks_words_and_moves_figures(capsys):
    rows = [{"name": "[x]", "text": "word " * 30, "figure": 1234567, "other": 7}]
    columns = [Column("name", "name", name=True), Column("text", "text", words=True)]
    columns += [Column("figure", "a header of forty characters, in one line"), Column("other", "o")]
    print_table(rows, columns)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("[x]" in line for line in lines) == 1
    assert any("1,234,567" in line for line in lines)
    rows[0]["name"] = "n" * 50
    print_table(rows, columns)
    assert sum("n" * 50 in line for line in capsys.readouterr().out.splitlines()) == 3


def test_what_nobody_reads_on_a_terminal_is_cut_and_said_to_be(capsys):
    columns = (Column("name", "run", name=True), Column("odd", "odd"))
    print_table([{"name": "x " * 300_000, "odd": 1.0}], columns)
    assert len(capsys.readouterr().out) < 10_000
    print_table([{"name": str(row), "odd": row} for row in range(1500)], columns)
    told = capsys.readouterr().out
    assert "500 more rows; --json prints them all" in told
    assert "\n999  999\n" in told
    assert "1000  " not in told
    print_table([{"name": str(row), "odd": row} for row in range(1000)], columns)
    assert "more rows" not in capsys.readouterr().out


def test_any_value_has_a_text():
    values = (True, False, None, 3, 0.5, [1, 64], (), "a")
    assert [*map(plain, values)] == ["yes", "no", "-", "3", "0.500", "1, 64", "", "a"]


def command_alone(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "ditdial", *arguments],
        env={**os.environ, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["methods"], "method     changes"),
        pytest.param(["backbones"], " " * 32 + "patch size", marks=pytest.mark.slow),
        pytest.param(
            ["cost", "--model", "dit-xl-2-256"],
            "dit-xl-2-256, per forward pass",
            marks=pytest.mark.slow,
        ),
        (["cost", "--model", "mnist", "--json"], "{\n"),
    ],
)
def test_nothing_is_printed_before_a_commands_output(arguments, start):
    """In a process of its own: torchao, where it is installed, warns when it is first imported."""
    done = command_alone(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(start)


def test_real_errors_and_our_own_warnings_are_not_hidden(capsys):
    configure_logging()
    assert logging.getLogger("ditdial.training.loop").isEnabledFor(logging.INFO)
    for name in (*CHATTY, "torch", "diffusers", "transformers", "datasets"):
        assert logging.getLogger(name).isEnabledFor(logging.ERROR)
    for name in ("torch", "diffusers", "diffusers.pipelines", "datasets"):
        assert logging.getLogger(name).isEnabledFor(logging.WARNING)
