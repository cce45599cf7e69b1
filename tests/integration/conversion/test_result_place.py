"""Where results are put: what stands there or beside it, what is read, and room on the disk."""

import shutil

import pytest

from int4_lora.integration.conversion import unpack_checkpoint
from int4_lora.integration.conversion.convert import Settings
from support.conversion import SMALL, bytes_of, convert, run


def test_what_stands_there_is_replaced_only_when_told(sharded, tmp_path):
    target = tmp_path / "dense"
    target.mkdir()
    (target / "mine").write_text("mine")
    result = run("unpack", sharded, target)
    assert result.exit_code == 2
    assert "--force replaces it" in result.stderr
    assert bytes_of(target) == {"mine": b"mine"}
    assert not (tmp_path / "dense.partial").exists()
    convert("unpack", sharded, target, "--force")
    assert "mine" not in bytes_of(target)
    assert {file.name for file in tmp_path.iterdir()} == {"dense"}
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(target)
    for place in (file, link):
        result = run("unpack", sharded, place, "--force")
        assert result.exit_code == 2
        assert "is no folder" in result.stderr
    assert file.read_text() == "mine"
    assert link.is_symlink()


def test_what_is_not_ours_beside_the_target_is_left_alone(sharded, tmp_path):
    mine = tmp_path / "dense.partial" / "result" / "model.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for options in (["--dry-run"], ["--shard", "1/1"], ["--force"]):
        convert("unpack", sharded, tmp_path / "dense", *options)
        assert bytes_of(tmp_path / "dense.partial") == {"result/model.safetensors": b"mine"}
    assert "result/model.safetensors" not in bytes_of(tmp_path / "dense")
    (tmp_path / "other.partial").write_text("mine")
    result = run("unpack", sharded, tmp_path / "other", "--force")
    assert result.exit_code == 2
    assert "is no folder" in result.stderr
    assert (tmp_path / "other.partial").read_text() == "mine"


def test_a_source_that_is_called_as_a_partial_result_is_not_touched(sharded, tmp_path):
    base = shutil.copytree(sharded, tmp_path / "model.partial")
    inner = shutil.copytree(sharded, tmp_path / "outer.partial/base")
    for folder, target in ((base, tmp_path / "model"), (inner, tmp_path / "outer")):
        result = run("unpack", folder, target, "--force")
        assert result.exit_code == 2
        assert "must be apart" in result.stderr
        assert bytes_of(folder) == bytes_of(sharded)


def test_what_appears_in_the_place_meanwhile_is_not_replaced(sharded, tmp_path, monkeypatch):
    from int4_lora.integration.conversion import convert as module

    target, fill = tmp_path / "dense", module._write_other_files

    def meanwhile(*arguments):
        fill(*arguments)
        target.mkdir()
        (target / "mine").write_text("mine")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_other_files", meanwhile)
        result = run("unpack", sharded, target)
    assert result.exit_code == 2
    assert "--force replaces it" in result.stderr
    assert bytes_of(target) == {"mine": b"mine"}


def test_of_two_plans_at_once_the_later_keeps_its_result_until_it_is_told(
    sharded, tmp_path, monkeypatch
):
    from int4_lora.integration.conversion import convert as module

    target, fill = tmp_path / "dense", module._write_other_files
    wide = ["unpack", sharded, target, "--dtype", "float32"]

    def meanwhile(place, *arguments):
        fill(place, *arguments)
        monkeypatch.setattr(module, "_write_other_files", fill)
        convert(*wide)

    monkeypatch.setattr(module, "_write_other_files", meanwhile)
    result = run("unpack", sharded, target)
    assert result.exit_code == 2
    (kept,) = tmp_path.glob("dense.partial/*/result")
    said = "".join(result.stderr.split())
    assert f"--forcereplacesit;thewholeresultiskeptin{kept}" in said
    first = bytes_of(target)
    convert(*wide[:2], tmp_path / "wide", *wide[3:])
    assert first == bytes_of(tmp_path / "wide")
    convert("unpack", sharded, target, "--force")
    assert bytes_of(target) != first
    assert {file.name for file in tmp_path.iterdir()} == {"dense", "wide"}


def test_what_appears_at_the_last_moment_is_not_replaced(sharded, tmp_path, monkeypatch):
    from pathlib import Path

    target, rename = tmp_path / "dense", Path.rename

    def meanwhile(path, place):
        if path.name == "result":
            target.mkdir()
            (target / "mine").write_text("mine")
        return rename(path, place)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", meanwhile)
        result = run("unpack", sharded, target)
    assert result.exit_code == 2
    assert "was made in the meantime: --force replaces it" in " ".join(result.stderr.split())
    assert bytes_of(target) == {"mine": b"mine"}


def test_a_replacement_that_was_stopped_halfway_loses_neither(sharded, tmp_path, monkeypatch):
    from pathlib import Path

    target, rename = tmp_path / "dense", Path.rename
    target.mkdir()
    (target / "mine").write_text("mine")

    def stop(path, place):
        if path.name == "result":
            raise KeyboardInterrupt
        return rename(path, place)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            unpack_checkpoint(sharded, target, settings=Settings(force=True))
    assert [file.read_text() for file in tmp_path.rglob("mine")] == ["mine"]
    convert("unpack", sharded, target, "--dtype", "float32")  # another plan leaves it alone
    assert [file.read_text() for file in tmp_path.rglob("mine")] == ["mine"]
    shutil.rmtree(target)
    convert("unpack", sharded, target, "--force")
    assert {file.name for file in tmp_path.iterdir()} == {"dense"}


def test_room_is_checked_first(sharded, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9 - 1000, 1000))
    for options in ([], ["--dry-run"]):
        result = run("unpack", sharded, tmp_path / "dense", *options)
        assert result.exit_code == 2
        assert "1000 are free" in result.stderr
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(sharded, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("unpack", sharded, tmp_path / "file/dense")
    assert result.exit_code == 2
    assert "file" in result.stderr
    assert (tmp_path / "file").read_text() == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sharded)
        assert "apart from" in run("unpack", ".", ".").stderr


def test_a_dry_run_writes_nothing(sharded, tmp_path):
    planned = convert("unpack", sharded, tmp_path / "dense", "--dry-run", *SMALL)
    assert not list(tmp_path.iterdir())
    outcome = unpack_checkpoint(
        sharded, tmp_path / "dense", settings=Settings(most_bytes=500_000, jobs=1)
    )
    assert planned["files"] == outcome.files
    sizes = {name: (tmp_path / "dense" / name).stat().st_size for name in outcome.files}
    assert sizes == outcome.files
