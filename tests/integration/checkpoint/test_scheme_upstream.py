"""quantization_config as we read it, against compressed-tensors' own classes."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

from int4_lora.integration.checkpoint.compressed_tensors import upstream_scheme
from int4_lora.integration.checkpoint.scheme import read_schemes
from support.upstream_versions import IGNORES_G_IDX

pytestmark = pytest.mark.versions
STRATEGIES = (None, "tensor", "channel", "group", "tensor_group", "block", "token", "attn_head")
SIZES = (None, -2, -1, 0, 1, 128)
BLOCKS = (None, [128, 64], "128x64")
DYNAMIC = (None, False, True, "local")
NUMBERS = ({"num_bits": 4}, {"num_bits": 8, "symmetric": False}, {"type": "FLOAT"}, {})
STRANGE = (None, -1, 1.5, "banana", "", [], [128], [1, 2, 3], {"a": 1}, "128x", "ax1")


def ours(name, group):
    """Return our scheme of a config group, or None where it is refused."""
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {name: group},
    }
    try:
        found = read_schemes(Path("config.json"), {"quantization_config": quantization}, ["q_proj"])
    except ValueError as error:
        if not str(error).startswith(f"config.json: config_groups.{name}: "):
            raise
        return None
    return found["q_proj"]


def theirs(weights):
    """Return compressed-tensors' arguments, or None where they are refused."""
    try:
        return QuantizationArgs(**{key: one for key, one in weights.items() if one is not None})
    except (TypeError, ValueError, NotImplementedError):
        return None


def meaning(args):
    """Return what our scheme should hold of compressed-tensors' arguments."""
    size = tuple(args.block_structure) if args.strategy == "block" else args.group_size
    size = size if args.strategy in ("group", "tensor_group", "block") else None
    return (args.type, args.num_bits, args.symmetric, args.strategy, size)


def assert_same(weights):
    found, args = ours("group_0", {"targets": ["Linear"], "weights": weights}), theirs(weights)
    assert (found is None) == (args is None), weights
    if found is not None:
        read = (found.kind, found.bits, found.symmetric, found.strategy, found.group_size)
        assert read == meaning(args), weights
        assert meaning(upstream_scheme(found).weights) == meaning(args)
    return found is not None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_combination_of_strategy_size_blocks_and_dynamic(strategy):
    accepted = [
        assert_same(
            {
                "strategy": strategy,
                "group_size": size,
                "block_structure": blocks,
                "dynamic": dynamic,
                **numbers,
            }
        )
        for size, blocks, dynamic, numbers in itertools.product(SIZES, BLOCKS, DYNAMIC, NUMBERS)
    ]
    assert True in accepted
    assert False in accepted


@pytest.mark.parametrize(
    "field",
    ["num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic"],
)
@pytest.mark.parametrize("value", STRANGE, ids=str)
def test_values_of_another_type(field, value):
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, field: value}
    if field == "block_structure":
        weights.update(strategy="block", group_size=None)
    if (field, value) == ("num_bits", -1):
        assert ours("group_0", {"targets": ["Linear"], "weights": weights}) is None
    else:
        assert_same(weights)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_bits", "4"), ("num_bits", 4.0), ("symmetric", "yes"), ("group_size", 32.0)],
)
def test_values_that_only_pydantic_converts_are_refused(field, value):
    """No version wrote them; compressed-tensors takes them for numbers and booleans."""
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, field: value}
    assert theirs(weights) is not None
    assert ours("group_0", {"targets": ["Linear"], "weights": weights}) is None


@pytest.mark.parametrize(
    "value", [None, False, True, "group", "GROUP", "dynamic", "weight", "static", "banana", [], 3]
)
def test_activation_orders(value):
    weights = {"strategy": "group", "group_size": 32, "actorder": value}
    found = ours("group_0", {"targets": ["Linear"], "weights": weights})
    if IGNORES_G_IDX and found is not None and found.actorder == "group":
        assert theirs(weights) is None  # 0.19 and later refuse to write it
        return
    args = theirs(weights)
    assert (found is None) == (args is None)
    if found is not None:
        order = getattr(args.actorder, "value", args.actorder)
        assert found.actorder == {"static": "weight", "dynamic": "group"}.get(order, order)


def test_presets():
    compared = 0
    for name in PRESET_SCHEMES:
        upstream = preset_name_to_scheme(name, ["Linear"])
        if upstream.weights is None:
            assert ours_is_left_alone(name)
            continue
        found = ours(name, ["Linear"])
        if name == "W8A16" and upstream.weights.strategy == "channel":
            continue  # up to 0.15; a checkpoint's scales tell which it is
        read = (found.kind, found.bits, found.symmetric, found.strategy, found.group_size)
        assert read == meaning(upstream.weights), name
        both = (upstream.input_activations, upstream.output_activations)
        assert found.activations == any(part is not None for part in both), name
        compared += 1
    assert compared >= 15
    assert ours("w4a16", ["Linear"]) == ours("W4A16", ["Linear"])


def ours_is_left_alone(name):
    """Return whether a preset has no weights, so that no module finds a group."""
    quantization = {"quant_method": "compressed-tensors", "config_groups": {name: ["Linear"]}}
    return read_schemes(Path("config.json"), {"quantization_config": quantization}, []) == {}


PROGRAM = """
import sys
from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint.inspect import inspect
checkpoint = open_checkpoint(sys.argv[1])
inspect(checkpoint)
checkpoint.packed_weight(checkpoint.modules()[0])
assert "compressed_tensors" not in sys.modules
assert "transformers" not in sys.modules
"""


def test_a_checkpoint_is_opened_without_compressed_tensors(tiny_models):
    command = [sys.executable, "-c", PROGRAM, str(tiny_models["asym-g32"])]
    subprocess.run(command, check=True)
