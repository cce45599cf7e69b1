"""What is remembered on disk: read back whole, never another key's, never an error."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from int4_lora.disk_cache import cache_folder, recall, remember

KEY = {"device": "cpu", "shape": [4096, 4096]}


@pytest.fixture(autouse=True)
def _empty(tmp_path, monkeypatch):
    monkeypatch.setenv("INT4_LORA_CACHE", str(tmp_path / "cache"))


def kept_files():
    return sorted(path for path in cache_folder().rglob("*") if path.is_file())


def test_a_value_comes_back_and_another_key_has_none():
    assert recall("kind", KEY) is None
    assert remember("kind", KEY, {"a": [1, 2.5, None]})
    assert recall("kind", KEY) == {"a": [1, 2.5, None]}
    assert recall("kind", {**KEY, "device": "cuda"}) is None
    assert recall("other", KEY) is None
    assert recall("kind", dict(reversed(KEY.items()))) == {"a": [1, 2.5, None]}


def test_the_last_value_stands():
    for value in (1, 2):
        remember("kind", KEY, value)
    assert recall("kind", KEY) == 2
    assert len(kept_files()) == 1


@pytest.mark.parametrize("spoilt", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"value": 1}'])
def test_a_spoilt_file_is_a_miss_and_is_replaced(spoilt):
    remember("kind", KEY, 1)
    kept_files()[0].write_bytes(spoilt)
    assert recall("kind", KEY) is None
    assert remember("kind", KEY, 2)
    assert recall("kind", KEY) == 2


def test_a_file_of_another_key_is_a_miss():
    remember("kind", KEY, 1)
    file = kept_files()[0]
    file.write_text(json.dumps({**json.loads(file.read_text()), "key": {"device": "cuda"}}))
    assert recall("kind", KEY) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INT4_LORA_CACHE", str(tmp_path / "file"))
    assert not remember("kind", KEY, 1)
    assert recall("kind", KEY) is None


def test_a_write_that_fails_leaves_nothing_behind(monkeypatch):
    remember("kind", KEY, 1)
    before = kept_files()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        assert not remember("kind", KEY, 2)
    assert kept_files() == before
    assert recall("kind", KEY) == 1


def test_writers_at_once_leave_one_whole_value():
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda n: remember("kind", KEY, [n] * 1000), range(64)))
        read = list(pool.map(lambda _: recall("kind", KEY), range(64)))
    assert all(written)
    assert all(len(set(value)) == 1 and len(value) == 1000 for value in read)
    assert len(kept_files()) == 1


def test_the_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("INT4_LORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "int4-lora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "int4-lora"
