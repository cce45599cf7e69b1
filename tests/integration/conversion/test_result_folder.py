"""Results that grow: killed at any moment and taken up, shared between runs, put in place whole."""

import errno
import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from conversion.test_unpack import bytes_of
from typer.testing import CliRunner

from int4_lora.integration.cli import app as cli
from int4_lora.integration.conversion import unpack_checkpoint, writing
from support.checkpoints import shard
from support.killing import begin
from support.tiny import LLAMA

SMALL = ("--max-shard-size", "0.0005")
KILLS = {"unpack": 17, "merge-dense": 17, "merge-int4": 16}  # 50 in all


def run(*arguments):
    return CliRunner().invoke(cli.app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def source(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed") / "source"
    shutil.copytree(tiny_models["asym-g32"], folder)
    shard(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    from int4_lora.integration.demo import recipe

    folder = tmp_path_factory.mktemp("killed-adapter") / "adapter"
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    recipe.make_adapter(folder, LLAMA, "adapter", settings)
    return folder


@pytest.mark.parametrize("command", KILLS)
def test_killed_at_random_moments_the_result_is_the_same(source, adapter, tmp_path, command):
    options = {
        "unpack": ["unpack", source],
        "merge-dense": ["merge", source, "--adapter", adapter],
        "merge-int4": ["merge", source, "--adapter", adapter, "--to", "int4"],
    }[command]
    before, chance = bytes_of(source), random.Random(command)
    undisturbed, target, partial = (tmp_path / name for name in ("a", "result", "result.partial"))
    begin(["--version"]).join()  # the imports are made once
    started = time.perf_counter()
    first = begin([*options, undisturbed, *SMALL])
    first.join()
    lasts = time.perf_counter() - started
    assert first.exitcode == 0
    expected, killed, met = bytes_of(undisturbed), 0, set()
    while killed < KILLS[command]:
        child = begin([*options, target, *SMALL])
        child.join(chance.uniform(0, lasts))
        child.kill()
        child.join()
        killed += child.exitcode != 0
        met.add((target.exists(), len(list(partial.glob("*/result/*.safetensors")))))
        if target.exists():
            assert bytes_of(target) == expected  # whole, or not there
        if target.exists() or chance.random() < 0.3:  # else it is killed again on its way
            assert run(*options, target, *SMALL).exit_code == 0 or target.exists()
            assert bytes_of(target) == expected
            shutil.rmtree(target)
            shutil.rmtree(partial, ignore_errors=True)
    if not target.exists():
        assert run(*options, target, *SMALL).exit_code == 0
    assert bytes_of(target) == expected
    assert len(met) > 1  # it was not killed at the same place every time
    assert bytes_of(source) == before


def test_a_run_that_was_killed_before_tidying_up_is_finished(source, tmp_path):
    target = tmp_path / "dense"
    assert run("unpack", source, target).exit_code == 0
    expected = bytes_of(target)
    assert run("unpack", source, target, *SMALL, "--shard", "1/1").exit_code == 2  # it is there
    shutil.rmtree(target)
    calls = []

    def stop(folder, *arguments, **options):
        calls.append(len(list(tmp_path.rglob("plan.json"))))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            unpack_checkpoint(source, target)
    assert calls == [1]
    assert bytes_of(target) == expected
    assert unpack_checkpoint(source, target).finished
    assert not (tmp_path / "dense.partial").exists()
    assert bytes_of(target) == expected


def test_a_run_that_was_killed_while_tidying_up_is_finished(source, adapter, tmp_path):
    target, stopped = tmp_path / "merged", []
    unlink = Path.unlink

    def stop(path, **options):
        unlink(path, **options)
        if path.suffix == ".report":  # one of them is gone
            stopped.append(path)
            raise KeyboardInterrupt

    command = ["merge", source, target, *SMALL, "--adapter", adapter, "--to", "int4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        assert run(*command).exit_code != 0
    expected = bytes_of(target)
    assert stopped
    assert list(tmp_path.glob("merged.partial/*"))
    assert run(*command).exit_code == 0
    assert bytes_of(target) == expected
    assert {file.name for file in tmp_path.iterdir()} == {"merged"}


def test_shares_are_joined_by_a_last_call(source, tmp_path):
    assert run("unpack", source, tmp_path / "whole", *SMALL).exit_code == 0
    target = tmp_path / "shared"
    for share in ("3/3", "1/3"):
        result = run("unpack", source, target, *SMALL, "--shard", share, "--json")
        assert result.exit_code == 0
        outcome = json.loads(result.stdout)
        assert outcome["written"]
        assert outcome["missing"]
        assert not outcome["finished"]
        assert not target.exists()
    outcome = json.loads(run("unpack", source, target, *SMALL, "--json").stdout)
    assert outcome["finished"]
    assert 0 < len(outcome["written"]) < len(outcome["files"])
    assert bytes_of(target) == bytes_of(tmp_path / "whole")


def test_two_runs_at_once_do_not_meet(source, tmp_path):
    assert run("unpack", source, tmp_path / "whole", *SMALL).exit_code == 0
    children = [begin(["unpack", source, tmp_path / "both", *SMALL]) for _ in range(3)]
    for child in children:
        child.join()
        assert child.exitcode in (0, 2)  # 2: begun when the result was there
    if not (tmp_path / "both").exists():  # the last file was another's when each looked
        assert run("unpack", source, tmp_path / "both", *SMALL).exit_code == 0
    assert bytes_of(tmp_path / "both") == bytes_of(tmp_path / "whole")
    assert not (tmp_path / "both.partial").exists()


def test_plans_do_not_meet(source, adapter, tmp_path):
    """Another dtype, other files, another source: each begins anew, and is what it is alone."""
    target = tmp_path / "dense"
    changed = shutil.copytree(source, tmp_path / "changed")
    plans = [
        ["unpack", source, target, *SMALL],
        ["unpack", source, target, *SMALL, "--dtype", "float32"],
        ["unpack", source, target, "--max-shard-size", "1"],
        ["unpack", changed, target, *SMALL],
        ["merge", source, target, *SMALL, "--adapter", adapter],
        ["merge", source, target, *SMALL, "--adapter", f"{adapter}=0.5"],
        ["merge", source, target, *SMALL, "--adapter", adapter, "--to", "int4"],
        ["merge", source, target, *SMALL, "--adapter", adapter, "--to=int4", "--scales=minmax"],
    ]
    for plan in plans:  # all begun
        outcome = json.loads(run(*plan, "--shard", "1/2", "--json").stdout)
        assert outcome["written"], plan
    os.utime(changed / "model-00001-of-00003.safetensors", ns=(0, 0))
    begun = json.loads(run(*plans[3], "--shard", "1/2", "--json").stdout)
    assert begun["written"]  # not taken up: the source is another
    for plan in plans:
        assert run(*plan, "--force").exit_code == 0
        alone = [tmp_path / "alone" if one == target else one for one in plan]
        assert run(*alone).exit_code == 0
        assert bytes_of(target) == bytes_of(tmp_path / "alone")
        shutil.rmtree(tmp_path / "alone")


def test_blocks_and_pieces_change_no_byte(source, adapter, tmp_path, monkeypatch):
    from int4_lora.integration.conversion import dense_modules, row_blocks, tasks

    merge = ["merge", source, "--adapter", adapter]
    commands = {
        "unpack": ["unpack", source, "--dtype", "float32"],
        "dense": merge,
        "int4": [*merge, "--to", "int4"],
    }
    for name, command in commands.items():
        assert run(*command[:2], tmp_path / name, *command[2:]).exit_code == 0
    monkeypatch.setattr(row_blocks, "WEIGHTS", 10_000)
    monkeypatch.setattr(tasks.Copy, "PIECE", 1000)
    monkeypatch.setattr(dense_modules, "ROWS_BYTES", 10_000)
    for name, command in commands.items():
        assert run(*command[:2], tmp_path / f"{name}-small", *command[2:]).exit_code == 0
        small, large = bytes_of(tmp_path / f"{name}-small"), bytes_of(tmp_path / name)
        report = [json.loads(one.pop("merge_report.json", b"{}")) for one in (small, large)]
        assert small == large
        if name == "int4":
            totals = [one["total"]["relative_error"] for one in report]
            assert totals[0] == pytest.approx(totals[1], rel=1e-12)


def test_a_full_disk_changes_nothing_and_is_gone_on_from(source, tmp_path, monkeypatch):
    target, written = tmp_path / "dense", []
    original = os.pwrite

    def full(descriptor, data, start):
        written.append(len(data))
        if sum(written) > 1_000_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, data, start)

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "pwrite", full)
        result = run("unpack", source, target, *SMALL)
    assert result.exit_code == 2
    assert "goes on where it was" in result.stderr
    assert not target.exists()
    outcome = json.loads(run("unpack", source, target, *SMALL, "--json").stdout)
    assert outcome["finished"]
    assert len(outcome["written"]) < len(outcome["files"])
    assert run("unpack", source, tmp_path / "whole", *SMALL).exit_code == 0
    assert bytes_of(target) == bytes_of(tmp_path / "whole")


def test_a_source_that_changes_on_the_way_is_noticed(source, tmp_path, monkeypatch):
    from int4_lora.integration.conversion import dense_modules

    changed = shutil.copytree(source, tmp_path / "changed")
    original = dense_modules.dense_rows

    def change(*arguments):
        file = changed / "model-00001-of-00003.safetensors"
        os.utime(file, ns=(0, 0))
        return original(*arguments)

    monkeypatch.setattr(dense_modules, "dense_rows", change)
    result = run("unpack", changed, tmp_path / "dense")
    assert result.exit_code == 2
    assert "changed since it was opened" in result.stderr
    assert not (tmp_path / "dense").exists()
