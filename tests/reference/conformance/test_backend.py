"""Backends: how they are named, their claims, their calls, and the outcomes of a run."""

import json
import subprocess
import sys
import unittest

import pytest
import torch
from typer.testing import CliRunner

import int4_lora.reference
from int4_lora.integration.cli.app import app
from int4_lora.integration.conformance import load_backend
from int4_lora.integration.conformance.mixin import (
    BackendConformance,
    check_case,
    conformance_cases,
)
from int4_lora.reference.conformance import (
    CASES,
    Backend,
    Manifest,
    case,
    run,
    select,
    settled,
)
from int4_lora.reference.conformance.reproduce import ranges
from support import conformance_backends as backends

runner = CliRunner()
SPEC = "support.conformance_backends"


def conform(*arguments):
    result = runner.invoke(app, ["conform", "--time-limit=0", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_a_manifest_is_read_from_a_mapping():
    manifest = Manifest.of({"dtypes": ["float16"], "accumulate": "float16", "groups": [0, 128]})
    assert manifest.dtypes == (torch.float16,)
    assert manifest.groups == (0, 128)
    assert Manifest.of(None) == Manifest()
    assert Manifest.of(manifest) is manifest


@pytest.mark.parametrize(
    ("claims", "error"),
    [
        ([], TypeError),
        ({"speed": 1}, ValueError),
        ({"dtypes": ["int8"]}, TypeError),
        ({"dtypes": "float16"}, TypeError),
        ({"g_idx": 1}, TypeError),
        ({"max_rank": -1}, TypeError),
        ({"max_rank": True}, TypeError),
        ({"in_multiple": 0}, TypeError),
        ({"accumulate": None}, TypeError),
        ({"strategies": ["rows"]}, TypeError),
        ({"formats": ["int8"]}, TypeError),
        ({"symmetric": "yes"}, TypeError),
    ],
)
def test_an_invalid_manifest_is_refused(claims, error):
    with pytest.raises(error, match="manifest"):
        Manifest.of(claims)


@pytest.mark.parametrize(
    ("claims", "case", "reason"),
    [
        ({"dtypes": ["float32"]}, "int4_linear/group_128/bf16", "x is bfloat16"),
        ({"scale_dtypes": ["bfloat16"]}, "int4_linear/scale_fp16/bf16", "float16 scales"),
        ({"scale_dtype_of_x": True}, "int4_linear/scale_fp16/bf16", "scales of another dtype"),
        ({"groups": [128]}, "int4_linear/group_32/bf16", "groups of 32"),
        ({"groups": [128]}, "int4_linear/channel/bf16", "one scale for a row"),
        ({"strategies": ["group"]}, "int4_linear/block_asym/bf16", "strategy block"),
        ({}, "int4_linear/nvfp4/bf16", "nvfp4 weights"),
        ({"formats": ["nvfp4"]}, "int4_linear/mxfp4/bf16", "mxfp4 weights"),
        ({"formats": ["nvfp4"]}, "int4_linear/group_128/bf16", "int4 weights"),
        ({"formats": ["mxfp4"], "in_multiple": 512}, "int4_linear/mxfp4/bf16", "in_features 256"),
        ({"symmetric": True}, "int4_linear/group_128_asym/bf16", "a weight with zero-points"),
        ({"symmetric": False}, "int4_linear/group_128/bf16", "a weight without zero-points"),
        ({"g_idx": False}, "int4_linear/g_idx/bf16", "g_idx"),
        ({"finite_scales": True}, "int4_linear/special_scales/bf16", "scales that are not finite"),
        ({"in_multiple": 32}, "int4_linear/ragged/bf16", "in_features 44"),
        ({"out_multiple": 16}, "int4_linear/outputs_72/bf16", "out_features 72"),
        ({"bias": False}, "int4_linear/bias_bf16/bf16", "a bias"),
        ({"slices": False}, "int4_lora_linear/slices_qkv/bf16", "slices"),
        ({"max_rank": 64}, "int4_lora_linear/rank_512/bf16", "rank 512"),
        ({"max_adapters": 4}, "int4_lora_linear/adapters_16/bf16", "16 adapters"),
        ({"devices": ["cuda"]}, "int4_linear/group_128/bf16", "device cpu"),
        ({"deterministic": False}, "int4_lora_linear/repeat/bf16", "declared not deterministic"),
    ],
)
def test_a_case_that_is_not_claimed_is_skipped_with_the_reason(claims, case, reason):
    class Claims:
        manifest = claims
        int4_linear = staticmethod(int4_lora.reference.int4_linear)
        int4_lora_linear = staticmethod(int4_lora.reference.int4_lora_linear)

    (outcome,) = run(Backend(Claims(), "claims"), select(case))
    assert outcome.status == "skipped"
    assert reason in outcome.message
    (outcome,) = run(Backend(int4_lora.reference, "all"), select(case))
    assert outcome.status == "passed"


def test_operands_are_prepared_once():
    under_test = backends.Prepared()
    outcomes = list(run(Backend(under_test, "prepared"), select("int4_lora_linear/re*/bf16")))
    assert {outcome.status for outcome in outcomes} == {"passed"}
    assert under_test.prepared == len(outcomes)


def test_an_exception_of_a_backend_is_a_finding():
    class Raises:
        def int4_linear(self, x, weight, bias=None):
            raise RuntimeError("no kernel\nfor this shape")

    (outcome,) = settled(list(run(Backend(Raises(), "x"), select("int4_linear/group_128/bf16"))))
    assert (outcome.status, outcome.rule, outcome.diagnosis) == ("failed", "call", ("unknown",))
    assert outcome.message == "raised RuntimeError: no kernel for this shape"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:x", "cannot import 'no_such_module'"),
        (f"{SPEC}:Nothing", "there is no 'Nothing' in it"),
        ("json", "has none of the functions"),
        ("", "must be module:object"),
        (":x", "must be module:object"),
    ],
)
def test_an_unusable_backend_is_an_error(spec, message):
    code, out, error = conform(spec)
    assert (code, out) == (2, "")
    assert message in error
    assert "\n" not in error.strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cases", "nothing"], "no case is named 'nothing'"),
        (["--seed", "one"], "one"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_an_unusable_option_is_an_error(options, message):
    code, _, error = conform("int4_lora.reference", *options)
    assert code == 2
    assert message in error


def test_conform_prints_the_verdict_and_the_skips():
    code, out, _ = conform(f"{SPEC}:Layer", "--cases", "pack/*,int4_linear/ragged/*")
    assert code == 0
    assert "skipped 5: no pack" in out
    assert "fix:" not in out
    assert f"{SPEC}:Layer: conforms" in out
    code, _, _ = conform(f"{SPEC}:Layer", "--cases", "pack/*")
    assert code == 2  # nothing was judged


def test_conform_stops_at_the_first_failure():
    cases = "int4_linear/ragged/bf16,int4_linear/scale_*/bf16"
    code, out, _ = conform(f"{SPEC}:ScaleOfX", "--cases", cases, "--json", "--first")
    report = json.loads(out)
    assert code == 1
    assert report["counts"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert report["not_run"] == 1


def test_a_case_is_opened_in_one_line():
    opened = case("int4_linear/group_32_asym/bf16")
    y = int4_lora.reference.int4_linear(opened.operands.x, opened.operands.weight)
    assert ((y.double() - opened.truth).abs() <= opened.bound).all()
    assert opened.check(y) is None
    assert opened.check(y * 1.1).rule == "bound"
    with pytest.raises(ValueError, match="did you mean 'int4_linear/group_32_asym/bf16'"):
        case("int4_linear/group_32/asym/bf16")
    with pytest.raises(ValueError, match="too large to be opened"):
        case("int4_linear/large_weight/bf16")


def test_conform_prints_json_with_the_diagnosis():
    cases = "int4_linear/scale_fp32/bf16,int4_linear/ragged/bf16"
    code, out, _ = conform(f"{SPEC}:ScaleOfX", "--cases", cases, "--json")
    report = json.loads(out)
    assert code == 1
    assert report["diagnosis"] == {"scale_rounded": 1}
    assert report["counts"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert report["manifest"]["accumulate"] == "float32"
    failed = next(each for each in report["cases"] if each["status"] == "failed")
    assert failed["diagnosis"] == ["scale_rounded"]
    assert "the weight too" in failed["variants"][0]


def test_the_smallest_failure_can_be_pasted(tmp_path):
    name = "int4_linear/scale_fp32/bf16"
    _, out, _ = conform(f"{SPEC}:ScaleOfX", "--cases", name, "--json")
    (case_report,) = json.loads(out)["cases"]
    assert "with_tokens(torch.tensor([0])).with_outputs(0, 8)" in case_report["snippet"]
    script = tmp_path / "again.py"
    script.write_text(case_report["snippet"])
    again = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.count("tensor") == 3


def test_fresh_seeds_are_printed():
    options = ("--seed", "fresh", "--cases", "int4_linear/ragged/*", "--json")
    seeds = {json.loads(conform("reference", *options)[1])["seed"] for _ in range(2)}
    assert len(seeds) == 2


def test_registered_names_beat_folders(tmp_path, monkeypatch):
    (tmp_path / "reference").mkdir()
    monkeypatch.chdir(tmp_path)
    assert conform("reference", "--cases", "pack/ragged")[0] == 0
    assert conform("./reference", "--cases", "pack/ragged")[0] == 2


def test_a_class_is_instantiated():
    assert isinstance(load_backend(f"{SPEC}:Layer").under_test, backends.Layer)


def test_ranges_of_numbers():
    assert ranges([1, 2, 3, 7, 9, 10], 12) == "1-3, 7, 9-10 of 12"
    assert ranges(list(range(0, 20, 2)), 20) == "0, 2, 4, 6, 8, 10 ... of 20"


class TestMixin(BackendConformance, unittest.TestCase):
    """The mixin, as a project uses it."""

    backend = backends.Prepared()


def test_the_mixin_has_a_test_for_each_case():
    tests = [name for name in dir(TestMixin) if name.startswith("test_case_")]
    assert len(tests) == len(select())


def test_the_mixin_fails_with_the_diagnosis_and_needs_a_backend():
    cases = {case.name: case for case in conformance_cases()}
    case = cases["int4_linear/scale_fp32/bf16"]
    with pytest.raises(AssertionError, match=r"diagnosis: scale_rounded"):
        check_case(backends.ScaleOfX(), case)
    with pytest.raises(unittest.SkipTest, match="no pack"):
        check_case(backends.Prepared(), cases["pack/ragged"])

    class Empty(BackendConformance, unittest.TestCase):
        pass

    with pytest.raises(TypeError, match="backend must be the object under test"):
        Empty("test_case_000_pack_all_codes").test_case_000_pack_all_codes()


@pytest.mark.parametrize(
    "case", conformance_cases("*/ragged*/bf16", quick=True), ids=lambda case: case.name
)
def test_the_cases_for_pytest(case):
    check_case(int4_lora.reference, case)


def test_the_optional_cases_are_the_large_ones():
    optional = {case.name for case in CASES if case.optional}
    assert optional == {"int4_lora_linear/large_output/bf16", "int4_linear/large_weight/bf16"}
