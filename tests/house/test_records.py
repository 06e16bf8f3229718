"""Records of long tests: written from a clean tree only, and out of date with what they cover."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import records
from scripts.records import DirtyTreeError, Target, complaint, record

TARGET = Target(
    name="test-long", command="python -c 'import covered'", paths=("covered.py", "folder")
)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with a covered file, a covered folder and one file more."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A tester")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "tester@example.org")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    root = tmp_path / "repository"
    (root / "folder").mkdir(parents=True)
    for file in ("covered.py", "folder/inside.txt", "other.txt"):
        (root / file).write_text("")
    git(root, "init", "--quiet")
    commit(root)
    return root


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True)


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "A change")


def change(root: Path, file: str, text: str = "x = 1\n") -> None:
    (root / file).write_text(text)
    commit(root)


def test_a_record_holds_until_a_covered_path_changes(repository):
    assert complaint(repository, TARGET) == "test-long: there is no record"
    found = record(repository, TARGET)
    assert found["outcome"] == "passed"
    file = repository / "benchmarks" / "records" / "test-long.json"
    assert json.loads(file.read_text()) == found
    assert {"command", "commit", "date", "machine", "seconds", "paths"} <= found.keys()
    assert complaint(repository, TARGET) == ""
    commit(repository)  # the record itself
    change(repository, "other.txt")
    assert complaint(repository, TARGET) == ""
    change(repository, "folder/inside.txt")
    since = f"test-long: changed since {found['commit'][:9]}: "
    assert complaint(repository, TARGET) == since + "folder"
    change(repository, "covered.py")
    assert complaint(repository, TARGET) == since + "covered.py, folder"
    record(repository, TARGET)
    assert complaint(repository, TARGET) == ""


def test_a_removed_path_makes_a_record_old(repository):
    record(repository, TARGET)
    (repository / "covered.py").unlink()
    commit(repository)
    assert complaint(repository, TARGET).endswith(": covered.py")


def test_a_failure_is_recorded_and_told(repository):
    change(repository, "covered.py", "raise SystemExit(3)\n")
    assert record(repository, TARGET)["outcome"] == "failed"
    assert complaint(repository, TARGET) == "test-long: outcome = 'failed'; legal: 'passed'"


def test_another_command_needs_another_record(repository):
    record(repository, TARGET)
    other = Target(name=TARGET.name, command="python -c ''", paths=TARGET.paths)
    assert "recorded for another command" in complaint(repository, other)


@pytest.mark.parametrize("file", ["covered.py", "other.txt", "new.txt"])
def test_a_dirty_tree_is_refused(repository, file):
    (repository / file).write_text("y = 2\n")
    with pytest.raises(DirtyTreeError, match=file):
        record(repository, TARGET)
    assert not (repository / "benchmarks").exists()


def test_a_record_of_another_target_is_no_dirt(repository):
    record(repository, TARGET)
    second = Target(name="test-second", command="python -c ''", paths=("other.txt",))
    assert record(repository, second)["outcome"] == "passed"


def test_a_shallow_clone_can_be_checked(repository, tmp_path):
    record(repository, TARGET)
    commit(repository)
    change(repository, "other.txt")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--depth", "1", repository.as_uri(), str(clone))
    assert complaint(clone, TARGET) == ""
    change(clone, "covered.py")
    assert complaint(clone, TARGET).endswith(": covered.py")


def test_the_command_fails_where_a_record_is_missing(repository):
    (repository / "scripts").mkdir()
    (repository / "scripts" / "records.py").write_text(Path(records.__file__).read_text())
    command = [sys.executable, "scripts/records.py", "check"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    for target in records.TARGETS:
        assert f"{target.name}: there is no record; run: make {target.name}" in done.stdout


@pytest.mark.parametrize("marker", ["slow", "fuzz"])
def test_every_long_test_is_run_and_covered(marker):
    target = next(target for target in records.TARGETS if target.name == f"test-{marker}")
    for file in sorted((records.ROOT / "tests").rglob("test_*.py")):
        if f"pytest.mark.{marker}" in file.read_text() and file != Path(__file__).resolve():
            folder = file.relative_to(records.ROOT).parent.as_posix()
            assert folder in target.paths
            assert folder in target.command.split()


def test_targets_cover_what_is_there_and_have_a_make_target():
    makefile = (records.ROOT / "Makefile").read_text()
    for target in records.TARGETS:
        assert f"\n{target.name}: " in makefile
        for path in target.paths:
            assert (records.ROOT / path).exists(), path
