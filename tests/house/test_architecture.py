"""The pictures of the architecture are what the code says, and following the code bites."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from scripts.architecture import CALL, IDEA, PAGE, draw_rooms, follow, layers, made, rooms

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "ditdial"


@pytest.fixture(scope="module")
def found():
    return rooms()


def test_pictures_and_page_are_up_to_date():
    old = [name for name, content in made().items() if (ROOT / name).read_text() != content]
    assert not old, f"{', '.join(old)}: run `make architecture`"


def test_every_room_is_drawn_in_its_layer(found):
    told = layers((ROOT / "pyproject.toml").read_text())
    assert [room.name for room in found] == [name for layer in told for name in layer]
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {room.name for room in found} == files | folders
    assert all(room.about.endswith(".") for room in found)


def test_imports_go_down(found):
    level = {room.name: room.level for room in found}
    assert all(level[known] > room.level for room in found for known in room.knows)
    assert "plan" in next(room.knows for room in found if room.name == "runtime")


def test_an_upward_import_would_be_seen(found):
    assert "#c0392b" not in draw_rooms(found)
    upward = [replace(room, knows=frozenset({"cli"})) for room in found[-1:]]
    assert "#c0392b" in draw_rooms([*found[:-1], *upward])


@pytest.mark.parametrize("way", [CALL, IDEA], ids=["one call", "to the idea"])
def test_sentences_name_the_files_of_their_steps(way):
    heading = "## One call" if way is CALL else "## The way to the idea"
    part = (ROOT / PAGE).read_text().split(f"{heading}\n")[1].split("\n## ")[0]
    _, *sentences = re.split(r"\n(?=\d+\. )", part)
    numbers = [int(sentence.split(".")[0]) for sentence in sentences]
    assert numbers == sorted({step.number for step in way} - {0})
    for step in way:
        if step.number:
            sentence = sentences[step.number - 1]
            assert f"`{step.file}`" in sentence
            assert step.name.split(".")[-1] in sentence or step.name.split(".")[0] in sentence


def test_the_idea_is_five_files_away():
    assert len({step.file for step in IDEA}) <= 5


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("runtime/step.py", "def _choose(", "def _pick(", "has no Step._choose"),
        ("runtime/engine.py", "engine.run", "engine.run", None),
        (
            "runtime/step.py",
            "self.run.choosing.decide(",
            "self.run.choosing.pick(",
            "does not lead to",
        ),
        ("runtime/compiled.py", "forward(**call)", "stock(**call)", "does not lead to"),
    ],
)
def test_a_way_that_changed_is_found(tmp_path, file, old, new, told):
    shutil.copytree(PACKAGE, tmp_path / "ditdial", ignore=shutil.ignore_patterns("reference"))
    changed = tmp_path / "ditdial" / file
    text = changed.read_text()
    changed.write_text(text.replace(old, new).replace("forward = self._forward", "stock = 1"))
    if told is None:
        changed.write_text(text)
        assert len(follow(CALL, tmp_path / "ditdial")) == len(CALL)
        return
    with pytest.raises(ValueError, match=told):
        follow(CALL, tmp_path / "ditdial")
