"""Faults that are easy to miss, and the rules that find them."""

import json

import pytest
from typer.testing import CliRunner

from int4_lora.integration.cli.app import app
from int4_lora.reference.conformance import Backend, run, select, settled
from support import conformance_backends as backends
from support import conformance_faults as faults

SPEC = "support.conformance_faults:Exits"


@pytest.mark.parametrize(
    ("kind", "case", "rule"),
    [
        (faults.PreparesInPlace, "int4_linear/ragged/bf16", "modified"),
        (faults.Exits, "int4_linear/ragged/bf16", "call"),
        (faults.FirstScalings, "int4_lora_linear/slices_qkv/bf16", "bound"),
        (faults.NoBiasOfSlices, "int4_lora_linear/slices_qkv/fp32", "bound"),
        (faults.LastAdapter, "int4_lora_linear/adapters_16/bf16", "bound"),
        (faults.FirstBias, "int4_lora_linear/replay/bf16", "bound"),
        (faults.Contiguous, "int4_lora_linear/non_contiguous/bf16", "class"),
        (faults.OwnBuffer, "int4_lora_linear/kept/bf16", "kept"),
        (faults.OneNanForAll, "int4_lora_linear/special_x/bf16", "class"),
    ],
)
def test_faults_that_are_easy_to_miss(kind, case, rule):
    (outcome,) = run(Backend(kind(), "x"), select(case))
    assert (outcome.status, outcome.rule) == ("failed", rule), outcome.message


def test_int4_lora_linear_stands_in_for_a_missing_int4_linear():
    outcomes = list(run(Backend(backends.EagerLow(), "x"), select("int4_linear/ragged*/bf16")))
    assert {outcome.status for outcome in outcomes} == {"passed"}


def test_an_undeclared_rounding_is_named():
    undeclared = type("Undeclared", (backends.BaseRounded,), {"manifest": None})
    cases = select("int4_lora_linear/bias/*,int4_lora_linear/mixed/fp16")
    outcomes = settled(list(run(Backend(undeclared(), "x"), cases)))
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    assert failed
    assert {outcome.diagnosis for outcome in failed} == {("unknown",)}
    assert {outcome.variants for outcome in failed} == {
        ("right if the manifest says base_rounded=True",)
    }


def test_output_of_a_backend_is_not_in_the_json():
    result = CliRunner().invoke(
        app,
        [
            "conform",
            "support.conformance_faults:Exits",
            "--cases",
            "int4_linear/ragged/bf16",
            "--json",
            "--time-limit=0",
        ],
    )
    assert result.exit_code == 1
    assert json.loads(result.stdout)["counts"]["failed"] == 1
