"""What compressed-tensors made of a config group is remembered, and only while it is the same."""

import subprocess
import sys
from dataclasses import asdict

import pytest
from compressed_tensors.quantization import preset_name_to_scheme

from int4_lora.integration.checkpoint import config_groups
from int4_lora.integration.checkpoint.config_groups import parse_group

GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 64},
}


@pytest.fixture(autouse=True)
def _empty(tmp_path, monkeypatch):
    monkeypatch.setenv("INT4_LORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def asked(monkeypatch):
    """Return the list of groups that compressed-tensors is asked about."""
    calls, real = [], config_groups.upstream_scheme

    def recorded(name, group):
        calls.append(name)
        return real(name, group)

    monkeypatch.setattr(config_groups, "upstream_scheme", recorded)
    return calls


def test_a_group_is_parsed_once(asked):
    first, second = parse_group("group_0", GROUP), parse_group("group_0", GROUP)
    assert asked == ["group_0"]
    assert first == second
    assert first.group_size == 64
    assert first.strategy == "group"


def test_another_group_name_or_version_is_parsed_again(asked, monkeypatch):
    parse_group("group_0", GROUP)
    parse_group("group_0", {**GROUP, "weights": {**GROUP["weights"], "group_size": 32}})
    parse_group("group_1", GROUP)
    monkeypatch.setattr(config_groups, "version", lambda _: "0.0.1")
    parse_group("group_0", GROUP)
    assert asked == ["group_0", "group_0", "group_1", "group_0"]


def test_what_is_refused_is_not_remembered(asked):
    bad = {**GROUP, "weights": {**GROUP["weights"], "group_size": "many"}}
    for _ in range(2):
        with pytest.raises(ValueError, match="group_size"):
            parse_group("group_0", bad)
    assert len(asked) == 2


def test_a_preset_is_remembered_as_upstream_means_it(asked):
    first, second = parse_group("W4A16", ["Linear"]), parse_group("W4A16", ["Linear"])
    weights = preset_name_to_scheme("W4A16", ["Linear"]).weights
    assert first == second
    assert asked == ["W4A16"]
    assert (first.bits, first.group_size) == (weights.num_bits, weights.group_size)
    assert not first.activations


@pytest.mark.parametrize(
    "change",
    [
        {"targets": 5}, {"targets": [5]}, {"bits": "4"}, {"bits": True}, {"kind": None},
        {"symmetric": "no"}, {"group_size": "32"}, {"more": 1}, {"block_structure": 3},
    ],
)  # fmt: skip
def test_what_cannot_be_is_parsed_again(asked, monkeypatch, change):
    right = parse_group("group_0", GROUP)
    monkeypatch.setattr(config_groups, "recall", lambda *_: {**asdict(right), **change})
    assert parse_group("group_0", GROUP) == right
    assert asked == ["group_0", "group_0"]


def test_a_preset_that_leaves_weights_alone():
    assert parse_group("UNQUANTIZED", ["Linear"]) is None


PROGRAM = """
import sys
from int4_lora.integration import open_checkpoint
print(sorted(map(str, open_checkpoint(sys.argv[1]).schemes.values()))[0])
print("compressed_tensors" in sys.modules)
"""


def test_a_second_process_does_not_import_compressed_tensors(tiny_models):
    command = [sys.executable, "-c", PROGRAM, str(tiny_models["asym-g32"])]
    said = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)]
    (first, imported), (second, again) = [one.stdout.splitlines() for one in said]
    assert first == second
    assert (imported, again) == ("True", "False")
