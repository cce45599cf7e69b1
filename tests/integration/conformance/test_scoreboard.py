"""The scoreboard: peers held against the reference, and the page that is written."""

import json

import pytest
from typer.testing import CliRunner

from int4_lora.integration.cli.app import app
from int4_lora.integration.conformance import load_backend
from int4_lora.integration.conformance.loading import registered
from int4_lora.integration.conformance.scoreboard import BEGIN, END, Row, replaced, score
from int4_lora.reference.conformance import run, select, settled

runner = CliRunner()


def outcomes(name, cases):
    return settled(list(run(load_backend(name), select(cases))))


def failures(name, cases):
    return {
        outcome.case: outcome.diagnosis
        for outcome in outcomes(name, cases)
        if outcome.status == "failed"
    }


def test_every_peer_is_registered():
    assert {"reference", "compiled", "compressed_tensors", "transformers", "transformers_experts",
            "torch_int4pack", "vllm_cpu", "vllm_lora_0_33", "vllm_plugin", "vllm_marlin",
            "vllm_machete", "vllm_triton", "zentorch", "gemlite", "torchao", "fake_quantized",
            "quanto", "hqq", "auto_round", "mlx", "onnxruntime", "openvino"
            } <= set(registered())  # fmt: skip


def test_compressed_tensors_is_right_but_for_unequal_groups_and_a_scale_of_nan():
    results = outcomes("compressed_tensors", "dequantize/*/bf16,int4_linear/group_*/bf16")
    assert sum(outcome.status == "passed" for outcome in results) > 15
    named = {outcome.case: outcome.diagnosis for outcome in results if outcome.status == "failed"}
    assert named == {
        "dequantize/g_idx_unbalanced/bf16": ("g_idx_column_order",),
        "dequantize/mxfp4_all_scales/bf16": ("unknown",),  # infinity for the byte 255, which is NaN
    }


def test_torchs_operator_rounds_its_offsets():
    assert failures("torch_int4pack", "int4_linear/group_*/bf16") == {
        "int4_linear/group_128_asym/bf16": ("round_before_subtract",),
        "int4_linear/group_32_asym/bf16": ("round_before_subtract",),
    }


def test_transformers_loads_what_the_format_says():
    assert failures("transformers", "dequantize/ragged_asym/bf16,dequantize/channel/fp16") == {}


def test_the_compiled_path_conforms_in_small():
    cases = "int4_lora_linear/on_ragged_asym/bf16,int4_lora_linear/replay/bf16"
    assert {outcome.status for outcome in outcomes("compiled", cases)} == {"passed"}


def test_what_cannot_be_loaded_is_a_row_with_the_reason():
    names = ["vllm_machete", "reference"]
    scored = score(names, select("pack/ragged"), device="cpu", seed=0)
    rows = [row for _, row in scored if isinstance(row, Row)]
    assert rows[0].verdict == "there is no CUDA device"
    assert (rows[1].verdict, rows[1].count("passed")) == ("conforms", 1)


@pytest.fixture
def few(monkeypatch):
    """Ask few cases only."""
    cases = select("pack/ragged,dequantize/g_idx_unbalanced/bf16")
    place = "int4_lora.reference.conformance.select"
    monkeypatch.setattr(place, lambda quick: cases)


def test_a_page_keeps_what_is_around_the_table(few, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    names = ("--backends", "reference,compressed_tensors")
    for _ in range(2):
        result = runner.invoke(app, ["scoreboard", *names, "--write", str(page)])
        assert result.exit_code == 0, result.output
    text = page.read_text()
    assert text.startswith(f"# Mine\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "old" not in text
    assert "| `reference` | conforms | 2 | 0 | 0 |  |" in text
    assert "| `dequantize/g_idx_unbalanced/bf16` | g_idx_column_order | equal:" in text
    assert "torch 2" in text


def test_a_page_without_a_place_is_left_alone(few, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Mine\n")
    result = runner.invoke(app, ["scoreboard", "--backends", "reference", "--write", str(page)])
    assert result.exit_code == 2
    assert page.read_text() == "# Mine\n"
    assert replaced(tmp_path / "new.md", "table").startswith("# New")


def test_json_and_names(few):
    result = runner.invoke(app, ["scoreboard", "--backends", "compressed_tensors", "--json"])
    (backend,) = json.loads(result.stdout)["backends"]
    assert backend["diagnosis"] == {"g_idx_column_order": 1}
    assert backend["skipped"] == 1
    for wrong in ("nothing", " , "):
        result = runner.invoke(app, ["scoreboard", "--backends", wrong])
        assert result.exit_code == 2
