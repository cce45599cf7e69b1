"""quantization_config at any depth of config.json, once or several times."""

import copy
import json

import pytest

from int4_lora.integration import annotate, open_checkpoint
from support.conversion import convert, run
from support.handmade import quantization, small

PLACES = {
    "at the top": lambda q: {"quantization_config": q},
    "in text_config": lambda q: {"text_config": {"quantization_config": q}},
    "two levels down": lambda q: {"thinker_config": {"text_config": {"quantization_config": q}}},
    "in a list": lambda q: {"parts": [{"name": "vision"}, {"quantization_config": q}]},
    "by its old name": lambda q: {"a": {"b": {"compression_config": q}}},
    "in two places": lambda q: {"quantization_config": q, "a": {"quantization_config": q}},
    "null elsewhere": lambda q: {"quantization_config": None, "a": {"quantization_config": q}},
    "old and new": lambda q: {
        "quantization_config": q,
        "a": {"compression_config": {k: v for k, v in q.items() if k != "quant_method"}},
    },
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_it_is_found_at_any_depth(tmp_path, place):
    config = {"model_type": "x", **PLACES[place](quantization())}
    made = small()
    made.save(tmp_path / "x", config)
    assert sorted(open_checkpoint(tmp_path / "x").modules()) == sorted(made.quantised)
    convert("unpack", tmp_path / "x", tmp_path / "dense")
    left = (tmp_path / "dense" / "config.json").read_text()
    assert json.loads(left)["model_type"] == "x"
    assert "quantization_config" not in left
    assert "compression_config" not in left


def test_two_must_be_equal(tmp_path):
    inner = quantization()
    inner["config_groups"]["group_0"]["weights"]["group_size"] = 16
    config = {"quantization_config": quantization(), "a": {"b": {"quantization_config": inner}}}
    small().save(tmp_path / "x", config)
    said = "quantization_config and a.b.quantization_config must be equal"
    with pytest.raises(ValueError, match=r"config\.json: " + said):
        open_checkpoint(tmp_path / "x")
    for command in ("inspect", "verify", "annotate"):
        assert said in " ".join(run(command, tmp_path / "x").output.split())


def test_annotations_are_no_difference_and_are_kept_equal(tmp_path):
    """VLLM refuses a config whose copies of them contradict each other."""
    inner = {**quantization(), "lora_compatible": False, "quant_method": "compressed-tensors"}
    config = {"quantization_config": quantization(), "text_config": {"quantization_config": inner}}
    small().save(tmp_path / "x", copy.deepcopy(config))
    assert annotate(tmp_path / "x").lora_compatible
    written = json.loads((tmp_path / "x" / "config.json").read_text())
    assert written["lora_compatible"] is True
    assert written["text_config"]["quantization_config"]["lora_compatible"] is True
    assert written["quantization_config"] == quantization()
    assert annotate(tmp_path / "x").changed == ()


def test_another_method_deep_down_is_refused(tmp_path):
    config = {"quantization_config": quantization(), "a": {"quantization_config": {"bits": 4}}}
    small().save(tmp_path / "x", config)
    with pytest.raises(ValueError, match="'compressed-tensors', 'awq' or 'gptq', got None"):
        open_checkpoint(tmp_path / "x")


def test_a_config_that_is_nested_too_deep_is_refused(tmp_path):
    nested = {}
    for _ in range(150):
        nested = {"x": nested}
    small().save(tmp_path / "x", {"quantization_config": quantization(), "y": nested})
    with pytest.raises(ValueError, match="nested in more than 100 levels"):
        open_checkpoint(tmp_path / "x")


def test_a_dtype_is_set_where_it_was(tmp_path):
    config = {
        "dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16", "quantization_config": quantization()},
        "rope": {"deep": {"dtype": "kept"}},
    }
    small().save(tmp_path / "x", config)
    convert("unpack", tmp_path / "x", tmp_path / "dense", "--dtype=float32")
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == {
        "dtype": "float32",
        "text_config": {"torch_dtype": "float32"},
        "rope": {"deep": {"dtype": "kept"}},
    }
