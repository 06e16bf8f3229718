"""A results file tells where its numbers come from, and nothing of the machine's folders."""

from __future__ import annotations

import json
import sys

from ditdial.measure.provenance import provenance, write_results


def test_the_command_is_told_without_places_of_this_machine(monkeypatch, tmp_path):
    data, here = tmp_path / "digits", tmp_path / "work"
    data.mkdir()
    (here / "runs").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", ["/some/bench.py", "--data", str(data), "--run", "runs", "3"])
    assert provenance()["command"] == "bench.py --data digits --run runs 3"


def test_results_are_written_whole(tmp_path):
    path = tmp_path / "new" / "numbers.json"
    write_results(path, {"rows": [1, 2]}, command="make numbers")
    found = json.loads(path.read_text())
    assert found["rows"] == [1, 2]
    assert found["provenance"]["command"] == "make numbers"
    assert [each.name for each in path.parent.iterdir()] == ["numbers.json"]
