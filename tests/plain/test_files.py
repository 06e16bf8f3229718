"""Files and folders are written whole or not at all, under names that nobody can wait for."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from ditdial.plain import files


def test_a_file_is_replaced_by_text_or_bytes(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    assert files.write(path, "ä") == path
    assert path.read_bytes() == "ä".encode()
    files.write(path, b"\0")
    assert path.read_bytes() == b"\0"
    assert os.listdir(path.parent) == ["file"]


def test_a_file_has_the_rights_that_any_new_file_has(tmp_path):
    (tmp_path / "plain").touch()
    with files.writing(tmp_path / "file") as partial:
        os.chmod(partial, 0o600)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_file_stays_as_it_was_where_its_writing_ends_badly(tmp_path, error):
    (tmp_path / "file").write_text("old")

    def half():
        with files.writing(tmp_path / "file") as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        half()
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_is_replaced_and_not_followed(tmp_path, kind):
    target = tmp_path / "target"
    target.mkdir() if kind == "folder" else target.write_text("precious")
    (tmp_path / "file").symlink_to(target)
    files.write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()
    assert target.is_dir() if kind == "folder" else target.read_text() == "precious"


def test_a_name_of_any_legal_length_can_be_written(tmp_path):
    files.write(tmp_path / ("x" * 255), "new")
    with pytest.raises(OSError, match="x" * 256):
        files.write(tmp_path / ("x" * 256), "new")
    assert os.listdir(tmp_path) == ["x" * 255]


def test_an_error_of_the_system_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(IsADirectoryError, match="folder"):
        files.write(tmp_path / "folder", "new")
    with pytest.raises(OSError, match="taken"):
        files.write(tmp_path / "taken" / "file", "new")
    with pytest.raises(OSError, match="mine") as told, files.writing(tmp_path / "mine.json"):
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write into it would
    assert told.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="other"), files.writing(tmp_path / "mine.json"):
        (tmp_path / "other").read_text()
    assert sorted(os.listdir(tmp_path)) == ["folder", "taken"]


def test_a_folder_takes_its_place_whole(tmp_path):
    for text in ("first", "second"):
        with files.writing_folder(tmp_path / "a" / "b") as partial:
            (partial / "inside").mkdir()
            (partial / "inside" / "file").write_text(text)
        assert (tmp_path / "a" / "b" / "inside" / "file").read_text() == text
        assert os.listdir(tmp_path / "a") == ["b"]


def test_a_folder_stays_as_it_was_where_its_writing_ends_badly(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("old")

    def half():
        with files.writing_folder(tmp_path / "b") as partial:
            (partial / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert (tmp_path / "b" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["b"]


def test_what_a_replaced_folder_has_links_to_stays(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("precious")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "link").symlink_to(tmp_path / "kept")
    with files.writing_folder(tmp_path / "b"):
        pass
    assert os.listdir(tmp_path / "b") == []
    assert (tmp_path / "kept" / "file").read_text() == "precious"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_replaces_neither_a_file_nor_a_link(tmp_path, kind):
    (tmp_path / "target").mkdir()
    place = tmp_path / "place"
    place.write_text("mine") if kind == "file" else place.symlink_to(tmp_path / "target")
    with pytest.raises(NotADirectoryError, match="place"), files.writing_folder(place):
        pass
    assert sorted(os.listdir(tmp_path)) == ["place", "target"]


def fill(folder, *names, error=None):
    with files.filling(folder, ("a", "b", "c")) as partial:
        for name in names:
            (partial / name).write_text(f"new {name}")
        if error is not None:
            raise error


def test_the_files_of_a_folder_are_replaced_together_and_others_stay(tmp_path):
    folder = tmp_path / "folder"
    fill(folder, "a", "b")
    assert sorted(os.listdir(folder)) == ["a", "b"]
    (folder / "card").write_text("mine")
    (folder / "c").symlink_to(folder / "card")
    (folder / "b").write_text("old")
    before = folder.stat().st_ino
    fill(folder, "b", "c")
    assert sorted(os.listdir(folder)) == ["b", "c", "card"]  # a was not written again
    assert (folder / "card").read_text() == "mine"
    assert (folder / "b").read_text() == "new b"
    assert not (folder / "c").is_symlink()
    assert folder.stat().st_ino == before  # somebody may be in it
    assert os.listdir(tmp_path) == ["folder"]


def test_nothing_is_replaced_where_a_folder_is_in_the_place_of_a_file(tmp_path):
    folder = tmp_path / "folder"
    fill(folder, "a")
    (folder / "b").mkdir()
    (folder / "a").write_text("old")
    with pytest.raises(IsADirectoryError, match="folder/b"):
        fill(folder, "a", "b")
    assert (folder / "a").read_text() == "old"
    assert sorted(os.listdir(folder)) == ["a", "b"]


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_stays_as_it_was_where_its_filling_ends_badly(tmp_path, there):
    folder = tmp_path / "folder"
    if there:
        fill(folder, "a")
    with pytest.raises(KeyboardInterrupt):
        fill(folder, "b", error=KeyboardInterrupt())
    assert os.listdir(tmp_path) == ["folder"] * there
    assert not there or os.listdir(folder) == ["a"]


def test_a_device_and_what_is_no_text_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"'/dev/zero': thing of more than \d+ bytes"):
        files.read("/dev/zero", "thing")
    (tmp_path / "mine").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="mine': 'utf-8' codec"):
        files.read(tmp_path / "mine", "thing")
    with pytest.raises(FileNotFoundError, match=r"thing '.*mine/below' does not exist"):
        files.read(tmp_path / "mine" / "below", "thing")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        files.read(tmp_path, "thing")
