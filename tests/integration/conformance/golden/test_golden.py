"""Golden files: the same bytes every time, right results pass, wrong ones fail and are named."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import int4_lora.reference
from int4_lora.integration.cli.app import app
from int4_lora.integration.conformance import write_golden
from int4_lora.integration.conformance.golden.ordered_sums import ordered_sums
from int4_lora.integration.conformance.golden.write import exportable, file_name
from int4_lora.reference.conformance import Backend, Manifest, select
from int4_lora.reference.conformance.judging.yardstick import yardstick
from support import expert_backends
from support.conformance_backends import HalfSums

pytestmark = pytest.mark.versions

ROOT = Path(__file__).parents[4]
SMALL = ROOT / "tests" / "golden"
CASES = (
    "pack/ragged,unpack/ragged,unpack/zero_points,dequantize/ragged_asym/*,dequantize/cast/*,"
    "int4_linear/ragged*/bf16,int4_linear/exact/fp16,int4_lora_linear/on_ragged_asym/bf16,"
    "int4_lora_linear/slices_qkv/bf16,shrink/rank_3/bf16,expand/rank_3/bf16,from_gptq/g_idx/fp16,"
    "from_gptq/version_2/bf16,from_awq/columns_44/fp16,dequantize/nvfp4_all_scales/bf16,"
    "dequantize/mxfp4/bf16,int4_linear/nvfp4_token/bf16"
)
runner = CliRunner()


def results_of(under_test, folder, target, patterns=CASES):
    """Write what a backend returns for each case that it claims, and which formats it claims."""
    target.mkdir()
    backend = Backend(under_test, "under test")
    claims = {"formats": backend.manifest.formats}
    (target / "manifest.json").write_text(json.dumps(claims))
    for case in exportable(select(patterns)):
        operands = case.operands()
        if backend.skips(case.function, operands, "cpu") is None:
            result = backend.call(case.function, operands)
            save_file({"result": result.contiguous()}, target / file_name(case.name))
    return target


def checked(folder, results):
    result = runner.invoke(app, ["golden", "check", str(folder), str(results), "--json"])
    return result.exit_code, json.loads(result.stdout) if result.exit_code < 2 else result.stderr


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "new"
    result = runner.invoke(app, ["golden", "write", str(folder), "--cases", CASES])
    assert result.exit_code == 0, result.output
    return folder


def test_the_files_in_the_repository_are_written_again_byte_for_byte(golden):
    names = sorted(file.name for file in golden.iterdir())
    assert names == sorted(file.name for file in SMALL.iterdir())
    for name in names:
        assert (golden / name).read_bytes() == (SMALL / name).read_bytes(), name


def test_the_index_says_what_the_files_hold(golden):
    index = json.loads((golden / "index.json").read_text())
    assert (index["format"], index["version"]) == ("int4-lora golden", 2)
    for entry in index["cases"]:
        tensors = load_file(golden / entry["file"])
        bounds = {case["tensor"] for case in entry["bounds"].values()}
        assert set(tensors) == {*entry["operands"], "expected", *bounds}
        assert list(tensors["expected"].shape) == entry["result"]["shape"]
        with safe_open(golden / entry["file"], "pt") as file:
            metadata = file.metadata()
        assert metadata["function"] == entry["function"]
        assert metadata["case"] == entry["name"]


def test_the_reference_passes_and_a_faulty_backend_does_not(golden, tmp_path):
    code, report = checked(golden, results_of(int4_lora.reference, golden, tmp_path / "right"))
    assert (code, report["counts"]["failed"], report["counts"]["skipped"]) == (0, 0, 0)
    code, report = checked(golden, results_of(HalfSums(), golden, tmp_path / "wrong"))
    assert code == 1
    assert "low_precision_accumulate" in report["diagnosis"]
    skipped = [case for case in report["cases"] if case["status"] == "skipped"]
    assert {case["message"] for case in skipped} == {
        "no result file",
        "nvfp4 weights",
        "mxfp4 weights",
    }


def test_version_1_is_checked_still(golden, tmp_path):
    copied = shutil.copytree(golden, tmp_path / "golden")
    results = results_of(int4_lora.reference, copied, tmp_path / "results")
    index = json.loads((copied / "index.json").read_text())
    kept = [entry for entry in index["cases"] if "weight_format" not in entry["attributes"]]
    assert len(kept) == len(index["cases"]) - 3
    edit_index(copied, "version", 1)
    edit_index(copied, "cases", kept)
    code, report = checked(copied, results)
    assert (code, report["counts"]["passed"]) == (0, len(kept))


def test_one_wrong_number_is_found_in_each_kind_of_case(golden, tmp_path):
    results = results_of(int4_lora.reference, golden, tmp_path / "results")
    for file in sorted(results.glob("*.safetensors")):
        right = load_file(file)["result"]
        wrong = right.clone()
        wrong.view(-1)[-1] += 1
        save_file({"result": wrong}, file)
        code, report = checked(golden, results)
        assert code == 1
        assert [case["status"] for case in report["cases"]].count("failed") == 1, file.name
        save_file({"result": right}, file)


def test_results_are_a_backend_of_conform(golden, tmp_path):
    results = results_of(int4_lora.reference, golden, tmp_path / "results")
    result = runner.invoke(app, ["conform", str(results), "--cases", CASES, "--json"])
    assert result.exit_code == 0, result.output
    (results / "manifest.json").write_text('{"dtypes": ["float16"]}')
    result = runner.invoke(app, ["conform", str(results), "--json"])
    reasons = {case["message"] for case in json.loads(result.stdout)["cases"]}
    assert {"x is bfloat16", "needs a backend that can be called", "no result file"} <= reasons


def test_a_declared_rounding_has_a_bound_of_its_own(golden, tmp_path):
    results = results_of(int4_lora.reference, golden, tmp_path / "results")
    (results / "manifest.json").write_text('{"weight_rounded": false, "base_rounded": true}')
    code, report = checked(golden, results)
    assert (code, report["counts"]["skipped"]) == (0, 3)  # FP4 is not claimed
    claims = {**int4_lora.reference.manifest, "weight_rounded": False}  # it rounds FP4 weights
    (results / "manifest.json").write_text(json.dumps(claims))
    code, report = checked(golden, results)
    failed = [case["case"] for case in report["cases"] if case["status"] == "failed"]
    assert (code, failed) == (1, ["int4_linear/nvfp4_token/bf16"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda golden, results: (golden / "index.json").unlink(), "index.json"),
        (lambda golden, results: (golden / "index.json").write_text("{}"), "no index of golden"),
        (
            lambda golden, results: (golden / "index.json").write_text(
                '{"format": "int4-lora golden", "version": 9}'
            ),
            "version must be 1 to 2, got 9",
        ),
        (lambda golden, results: edit_index(golden, "cases", None), "cases that each name"),
        (lambda golden, results: edit_index(golden, "seed", "one"), "it needs a seed"),
        (lambda golden, results: edit_entry(golden, "file", "../x"), "a file in the folder"),
        (lambda golden, results: edit_entry(golden, "attributes", {}), "not what was written"),
        (lambda golden, results: edit_entry(golden, "result", {"dtype": "x"}), "not what was"),
        (lambda golden, results: shutil.rmtree(results), "no result of any of the cases"),
        (
            lambda golden, results: (results / "manifest.json").write_text('{"speed": 1}'),
            "there is no 'speed'",
        ),
        (
            lambda golden, results: (results / "pack.ragged.safetensors").write_bytes(b"x"),
            "pack.ragged.safetensors",
        ),
        (
            lambda golden, results: save_file(
                {"y": torch.zeros(1)}, results / "pack.ragged.safetensors"
            ),
            "there is no tensor 'result'",
        ),
        (
            lambda golden, results: (golden / "pack.ragged.safetensors").unlink(),
            "pack.ragged.safetensors",
        ),
    ],
)
def test_refuses_folders(change, message, golden, tmp_path):
    copied = shutil.copytree(golden, tmp_path / "golden")
    results = results_of(int4_lora.reference, copied, tmp_path / "results", "pack/ragged")
    change(copied, results)
    code, error = checked(copied, results)
    assert code == 2
    assert message in error


def edit_index(golden, key, value):
    file = golden / "index.json"
    index = json.loads(file.read_text())
    index[key] = value
    file.write_text(json.dumps(index))


def edit_entry(golden, key, value):
    index = json.loads((golden / "index.json").read_text())
    for entry in index["cases"]:
        entry[key] = value
    edit_index(golden, "cases", index["cases"])


def test_bounds_that_are_no_bounds_are_refused(golden, tmp_path):
    copied = shutil.copytree(golden, tmp_path / "golden")
    results = results_of(
        int4_lora.reference, copied, tmp_path / "results", "int4_linear/ragged/bf16"
    )
    file = copied / "int4_linear.ragged.bf16.safetensors"
    right = load_file(file)
    for wrong in (right["bound"] * float("nan"), -right["bound"], right["bound"][:1]):
        save_file({**right, "bound": wrong.contiguous()}, file)
        code, error = checked(copied, results)
        assert code == 2
        assert "bound must" in error


def test_claims_without_a_bound_in_the_files_are_judged_by_their_own(golden, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    manifest = Manifest(delta_rounded=True, base_rounded=True)
    (case,) = select("int4_lora_linear/on_ragged_asym/bf16")
    rounded = yardstick(case.function, case.operands(), manifest)
    save_file({"result": rounded}, results / file_name(case.name))
    assert checked(golden, results)[0] == 1
    (results / "manifest.json").write_text('{"delta_rounded": true, "base_rounded": true}')
    assert checked(golden, results)[0] == 0


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "file").write_text("mine")
    result = runner.invoke(app, ["golden", "write", str(tmp_path), "--cases", "pack/ragged"])
    assert result.exit_code == 2
    assert "must be empty or new" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    with pytest.raises(FileExistsError):
        list(write_golden(tmp_path, select("pack/ragged")))
    result = runner.invoke(app, ["golden", "write", str(tmp_path / "x"), "--cases", "*/replay/*"])
    assert result.exit_code == 2
    assert not (tmp_path / "x").exists()


def test_sums_in_order_do_not_depend_on_threads():
    x, w = torch.randn(5, 300, dtype=torch.float64), torch.randn(7, 300, dtype=torch.float64)
    with ordered_sums():
        product, total, mean = x @ w.T, x.sum(dim=1, keepdim=True), x.mean()
    expected = torch.zeros(5, 7, dtype=torch.float64)
    for column in range(300):
        expected += x[:, column, None] * w[:, column]
    assert torch.equal(product, expected)
    assert total.shape == (5, 1)
    torch.testing.assert_close(total, x.sum(dim=1, keepdim=True))
    torch.testing.assert_close(mean, x.mean())


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_backend_in_c_passes_and_fails_with_a_fault(golden, tmp_path):
    for name, options in (("right", []), ("wrong", ["-DFAULT"])):
        program, results = tmp_path / name, tmp_path / f"{name}-results"
        source = ROOT / "examples" / "golden_backend.c"
        command = ["cc", "-O2", "-Wall", "-Werror", *options, "-o", program, source, "-lm"]
        subprocess.run([str(part) for part in command], check=True)
        results.mkdir()
        subprocess.run([program, golden, results], check=True)
        code, report = checked(golden, results)
        passed = {case["case"] for case in report["cases"] if case["status"] == "passed"}
        if name == "right":
            assert code == 0
            assert {"int4_lora_linear/slices_qkv/bf16", "int4_linear/exact/fp16"} <= passed
            assert report["counts"] == {"passed": 14, "failed": 0, "skipped": 9}
        else:
            assert code == 1
            assert "offset" in report["diagnosis"]


EXPERTS = (
    "int4_moe/mixed/bf16,int4_moe/gate_and_up_apart/bf16,int4_moe/shared/bf16,int4_moe/g*/bf16"
)


@pytest.fixture(scope="module")
def golden_experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "experts"
    assert runner.invoke(app, ["golden", "write", str(folder), "--cases", EXPERTS]).exit_code == 0
    return folder


@pytest.mark.parametrize("name", expert_backends.HONEST)
def test_experts_pass_at_the_roundings_that_they_declare(name, golden_experts, tmp_path):
    backend = getattr(expert_backends, name)()
    results = results_of(backend, golden_experts, tmp_path / "right", EXPERTS)
    (results / "manifest.json").write_text(json.dumps(backend.manifest or {}))
    code, report = checked(golden_experts, results)
    assert (code, report["counts"]["failed"], report["counts"]["skipped"]) == (0, 0, 0)


@pytest.mark.parametrize("name", ["SharedOrder", "DroppedDown"])
def test_a_mistake_of_experts_is_named(name, golden_experts, tmp_path):
    backend = getattr(expert_backends, name)()
    code, report = checked(
        golden_experts, results_of(backend, golden_experts, tmp_path / "wrong", EXPERTS)
    )
    assert code == 1
    assert expert_backends.FAULTS[name] in report["diagnosis"]
