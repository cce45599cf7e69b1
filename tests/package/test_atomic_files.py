"""Files and folders: all or none, whole or not at all, and permissions kept."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from int4_lora import atomic_files
from int4_lora.atomic_files import new_folder, replace_files

NOBODY = 65534


@pytest.fixture
def folder():
    """Return a folder that anybody may look into."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        for file in ("a", "b"):
            Path(name, file).write_bytes(b"old")
        yield Path(name)


def held(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_new_contents_in_new_files(folder):
    os.chmod(folder / "a", 0o640)
    before = os.stat(folder / "a").st_ino
    replace_files({folder / "a": b"new", folder / "c": b"\0\n"}, like=folder / "a")
    assert held(folder) == {"a": b"new", "b": b"old", "c": b"\0\n"}
    assert os.stat(folder / "a").st_ino != before  # what shares the old file by name keeps it
    assert {stat.S_IMODE(os.stat(folder / name).st_mode) for name in "ac"} == {0o640}


def test_a_new_file_without_a_model_gets_the_permissions_of_the_umask(folder):
    (folder / "ordinary").write_bytes(b"")
    replace_files({folder / "c": b"new"})
    assert (folder / "c").stat().st_mode == (folder / "ordinary").stat().st_mode


def test_nothing_to_replace(folder):
    replace_files({}, like=folder / "a")
    assert held(folder) == {"a": b"old", "b": b"old"}


def test_a_full_disk_changes_nothing(folder, monkeypatch):
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_files({folder / "a": b"new", folder / "b": b"new"}, like=folder / "a")
    assert held(folder) == {"a": b"old", "b": b"old"}


@pytest.fixture
def powerless(folder):
    """Be somebody who may not write into the folder; root may always."""
    os.chmod(folder, 0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield
    if root:
        os.seteuid(0)
    os.chmod(folder, 0o755)


@pytest.mark.usefixtures("powerless")
def test_a_folder_that_is_read_only(folder):
    with pytest.raises(PermissionError, match=r"\.a\..*\.tmp"):
        replace_files({folder / "a": b"new"}, like=folder / "a")
    assert held(folder) == {"a": b"old", "b": b"old"}


def test_a_folder_is_there_once_it_is_whole(folder):
    with new_folder(folder / "deep" / "made") as made:
        (made / "file").write_text("whole")
        assert not (folder / "deep" / "made").exists()
    (folder / "ordinary").mkdir()
    assert [file.name for file in (folder / "deep").iterdir()] == ["made"]
    assert (folder / "deep" / "made" / "file").read_text() == "whole"
    assert (folder / "deep" / "made").stat().st_mode == (folder / "ordinary").stat().st_mode


def make(folder, text):
    with new_folder(folder) as made:
        (made / "file").write_text(text)
        if text == "second":
            make(folder, "first")
        assert text != "half"


def test_a_folder_whose_making_fails_leaves_nothing(folder):
    with pytest.raises(AssertionError):
        make(folder / "made", "half")
    assert held(folder) == {"a": b"old", "b": b"old"}


def test_of_two_that_make_one_folder_the_first_wins(folder):
    with pytest.raises(OSError, match="not empty"):
        make(folder / "made", "second")
    assert (folder / "made" / "file").read_text() == "first"
    assert sorted(file.name for file in folder.iterdir()) == ["a", "b", "made"]


@pytest.fixture
def synced(monkeypatch):
    """The inodes that were flushed; no name is given to anything that was not."""
    inodes, flush = set(), os.fsync

    def fsync(descriptor):
        flush(descriptor)
        inodes.add(os.fstat(descriptor).st_ino)

    def checked(give_name):
        def call(path, target):
            assert {part.stat().st_ino for part in (path, *path.rglob("*"))} <= inodes
            return give_name(path, target)

        return call

    monkeypatch.setattr(atomic_files.os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", checked(Path.rename))
    monkeypatch.setattr(Path, "replace", checked(Path.replace))
    return inodes


def test_files_are_on_the_disk_before_they_have_their_names(folder, synced):
    replace_files({folder / "a": b"new", folder / "c": b"new"})
    assert {(folder / name).stat().st_ino for name in "ac"} <= synced
    assert folder.stat().st_ino in synced


def test_a_folder_is_on_the_disk_before_it_has_its_name(folder, synced):
    with new_folder(folder / "made") as made:
        (made / "file").write_text("whole")
        (made / "deep").mkdir()
        (made / "deep" / "file").write_text("whole")
    assert (folder / "made").stat().st_ino in synced
    assert folder.stat().st_ino in synced
