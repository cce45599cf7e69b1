"""Results that grow: killed at any moment and taken up, shared between runs, put in place whole."""

import errno
import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from int4_lora.integration.conversion import result_files, unpack_checkpoint
from support.conversion import SMALL, bytes_of, convert, run
from support.killing import begin

COMMANDS = ("unpack", "merge-dense", "merge-int4")
MANY = pytest.param(17, marks=pytest.mark.nightly)  # 51 in all


@pytest.mark.parametrize("kills", [3, MANY])
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_random_moments_the_result_is_the_same(
    sharded, adapter, tmp_path, command, kills
):
    options = {
        "unpack": ["unpack", sharded],
        "merge-dense": ["merge", sharded, "--adapter", adapter],
        "merge-int4": ["merge", sharded, "--adapter", adapter, "--to", "int4"],
    }[command]
    before, chance = bytes_of(sharded), random.Random(command)
    undisturbed, target, partial = (tmp_path / name for name in ("a", "result", "result.partial"))
    begin(["--version"]).join()  # the imports are made once
    started = time.perf_counter()
    first = begin([*options, undisturbed, *SMALL])
    first.join()
    lasts = time.perf_counter() - started
    assert first.exitcode == 0
    expected, killed, met = bytes_of(undisturbed), 0, set()
    while killed < kills:
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
        convert(*options, target, *SMALL)
    assert bytes_of(target) == expected
    assert len(met) > 1 or kills < 10  # it was not killed at the same place every time
    assert bytes_of(sharded) == before


def test_a_run_that_was_killed_before_tidying_up_is_finished(sharded, tmp_path):
    target = tmp_path / "dense"
    convert("unpack", sharded, target)
    expected = bytes_of(target)
    assert run("unpack", sharded, target, *SMALL, "--shard", "1/1").exit_code == 2  # it is there
    shutil.rmtree(target)
    calls = []

    def stop(folder, *arguments, **options):
        calls.append(len(list(tmp_path.rglob("plan.json"))))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            unpack_checkpoint(sharded, target)
    assert calls == [1]
    assert bytes_of(target) == expected
    assert unpack_checkpoint(sharded, target).finished
    assert not (tmp_path / "dense.partial").exists()
    assert bytes_of(target) == expected


def test_a_run_that_was_killed_while_tidying_up_is_finished(sharded, adapter, tmp_path):
    target, stopped = tmp_path / "merged", []
    unlink = Path.unlink

    def stop(path, **options):
        unlink(path, **options)
        if path.suffix == ".report":  # one of them is gone
            stopped.append(path)
            raise KeyboardInterrupt

    command = ["merge", sharded, target, *SMALL, "--adapter", adapter, "--to", "int4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        assert run(*command).exit_code != 0
    expected = bytes_of(target)
    assert stopped
    assert list(tmp_path.glob("merged.partial/*"))
    convert(*command)
    assert bytes_of(target) == expected
    assert {file.name for file in tmp_path.iterdir()} == {"merged"}


def test_shares_are_joined_by_a_last_call(sharded, tmp_path):
    convert("unpack", sharded, tmp_path / "whole", *SMALL)
    target = tmp_path / "shared"
    for share in ("3/3", "1/3"):
        outcome = convert("unpack", sharded, target, *SMALL, "--shard", share)
        assert outcome["written"]
        assert outcome["missing"]
        assert not outcome["finished"]
        assert not target.exists()
    outcome = convert("unpack", sharded, target, *SMALL)
    assert outcome["finished"]
    assert 0 < len(outcome["written"]) < len(outcome["files"])
    assert bytes_of(target) == bytes_of(tmp_path / "whole")


def test_two_runs_at_once_do_not_meet(sharded, tmp_path):
    convert("unpack", sharded, tmp_path / "whole", *SMALL)
    children = [begin(["unpack", sharded, tmp_path / "both", *SMALL]) for _ in range(3)]
    for child in children:
        child.join()
        assert child.exitcode in (0, 2)  # 2: begun when the result was there
    if not (tmp_path / "both").exists():  # the last file was another's when each looked
        convert("unpack", sharded, tmp_path / "both", *SMALL)
    assert bytes_of(tmp_path / "both") == bytes_of(tmp_path / "whole")
    assert not (tmp_path / "both.partial").exists()


def test_plans_do_not_meet(sharded, adapter, tmp_path):
    """Another dtype, other files, another source: each begins anew, and is what it is alone."""
    target = tmp_path / "dense"
    changed = shutil.copytree(sharded, tmp_path / "changed")
    plans = [
        ["unpack", sharded, target, *SMALL],
        ["unpack", sharded, target, *SMALL, "--dtype", "float32"],
        ["unpack", sharded, target, "--max-shard-size", "1"],
        ["unpack", changed, target, *SMALL],
        ["merge", sharded, target, *SMALL, "--adapter", adapter],
        ["merge", sharded, target, *SMALL, "--adapter", f"{adapter}=0.5"],
        ["merge", sharded, target, *SMALL, "--adapter", adapter, "--to", "int4"],
        [
            "merge",
            sharded,
            target,
            *SMALL,
            "--adapter",
            adapter,
            "--to=int4",
            "--scales=minmax",
        ],
    ]
    for plan in plans:  # all begun
        outcome = convert(*plan, "--shard", "1/2")
        assert outcome["written"], plan
    os.utime(changed / "model-00001-of-00003.safetensors", ns=(0, 0))
    begun = convert(*plans[3], "--shard", "1/2")
    assert begun["written"]  # not taken up: the source is another
    for plan in plans:
        convert(*plan, "--force")
        alone = [tmp_path / "alone" if one == target else one for one in plan]
        convert(*alone)
        assert bytes_of(target) == bytes_of(tmp_path / "alone")
        shutil.rmtree(tmp_path / "alone")


def test_blocks_and_pieces_change_no_byte(sharded, adapter, tmp_path, monkeypatch):
    from int4_lora.integration.conversion import dense_modules, row_blocks, tasks

    merge = ["merge", sharded, "--adapter", adapter]
    commands = {
        "unpack": ["unpack", sharded, "--dtype", "float32"],
        "dense": merge,
        "int4": [*merge, "--to", "int4"],
    }
    for name, command in commands.items():
        convert(*command[:2], tmp_path / name, *command[2:])
    monkeypatch.setattr(row_blocks, "WEIGHTS", 10_000)
    monkeypatch.setattr(tasks.Copy, "PIECE", 1000)
    monkeypatch.setattr(dense_modules, "ROWS_BYTES", 10_000)
    for name, command in commands.items():
        convert(*command[:2], tmp_path / f"{name}-small", *command[2:])
        small, large = bytes_of(tmp_path / f"{name}-small"), bytes_of(tmp_path / name)
        report = [json.loads(one.pop("merge_report.json", b"{}")) for one in (small, large)]
        assert small == large
        if name == "int4":
            totals = [one["total"]["relative_error"] for one in report]
            assert totals[0] == pytest.approx(totals[1], rel=1e-12)


def test_a_full_disk_changes_nothing_and_is_gone_on_from(sharded, tmp_path, monkeypatch):
    target, written = tmp_path / "dense", []
    original = os.pwrite

    def full(descriptor, data, start):
        written.append(len(data))
        if sum(written) > 1_000_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, data, start)

    with monkeypatch.context() as patch:
        patch.setattr(result_files.os, "pwrite", full)
        result = run("unpack", sharded, target, *SMALL)
    assert result.exit_code == 2
    assert "continues where it stopped" in result.stderr
    assert not target.exists()
    outcome = convert("unpack", sharded, target, *SMALL)
    assert outcome["finished"]
    assert len(outcome["written"]) < len(outcome["files"])
    convert("unpack", sharded, tmp_path / "whole", *SMALL)
    assert bytes_of(target) == bytes_of(tmp_path / "whole")


def test_a_source_that_changes_on_the_way_is_noticed(sharded, tmp_path, monkeypatch):
    from int4_lora.integration.conversion import dense_modules

    changed = shutil.copytree(sharded, tmp_path / "changed")
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
