"""A backend with a fault fails, and the fault is named; a correct one passes in any order."""

import pytest

from int4_lora.reference.conformance import Backend, run, select, settled
from support import conformance_backends as backends
from support import expert_backends
from support.planted_backend import planted_reference
from support.reference_mutants import MUTANTS

FORMAT = "dequantize/*/bf16,unpack/*,pack/*,int4_linear/*/bf16,int4_lora_linear/on_*/bf16"
ADAPTERS = "shrink/*/bf16,expand/*/bf16,int4_lora_linear/*/bf16"
LAYOUTS = "from_*"
FLOAT4 = "*/nvfp4*/*,*/mxfp4*/*,*/on_nvfp4/*,*/on_mxfp4/*"
EXPERTS = "int4_moe/*"
PLANTED = {
    "nibble_order": ("nibble_order", FORMAT),
    "offset": ("offset", FORMAT),
    "missing_mask": ("sign_extension", FORMAT),
    "zero_point_sign": ("zero_point_sign", FORMAT),
    "zero_point_axis": ("zero_point_axis", FORMAT),
    "g_idx_ignored": ("g_idx_ignored", FORMAT),
    "groups_reversed": ("groups_reversed", FORMAT),
    "g_idx_column_order": ("g_idx_column_order", FORMAT),
    "round_before_subtract": ("round_before_subtract", FORMAT),
    "tail_lost": ("tail_lost", FORMAT),
    "g_idx_minus_one_indexed": ("g_idx_minus_one_indexed", FORMAT),
    "masked_by_multiplication": ("masked_by_multiplication", ADAPTERS),
    "awq_order_ignored": ("awq_order_ignored", LAYOUTS),
    "gptq_zero_plus_one": ("gptq_zero_plus_one", LAYOUTS),
    "packed_along_inputs": ("packed_along_inputs", LAYOUTS),
    "fp4_nibble_order": ("nibble_order", FLOAT4),
    "fp4_sign": ("fp4_sign", FLOAT4),
    "fp4_table": ("fp4_table", FLOAT4),
    "global_scale_missing": ("global_scale_missing", FLOAT4),
    "global_scale_multiplied": ("global_scale_multiplied", FLOAT4),
    "e8m0_bias": ("e8m0_bias", FLOAT4),
    "adapter_minus_one_indexed": ("adapter_minus_one_indexed", ADAPTERS),
    "scaling_missing": ("scaling_missing", ADAPTERS),
    "scaling_twice": ("scaling_twice", ADAPTERS),
    "slices_swapped": ("slices_swapped", ADAPTERS),
    "gate_up_swapped": ("gate_up_swapped", EXPERTS),
    "routed_weight_missing": ("routed_weight_missing", EXPERTS),
    "weights_before_activation": ("weights_before_activation", EXPERTS),
    "expert_adapters_dropped": ("expert_adapters_dropped", EXPERTS),
    "expert_and_adapter_swapped": ("expert_and_adapter_swapped", EXPERTS),
    "dropped_expert_indexed": ("dropped_expert_indexed", EXPERTS),
}


def outcomes(under_test, patterns, seed=0):
    backend = Backend(under_test, "under test")
    return settled(list(run(backend, select(patterns, quick=True), seed=seed)))


def diagnoses(results):
    """Return the diagnoses of the failures, and check that there are some."""
    names = [outcome.diagnosis for outcome in results if outcome.status == "failed"]
    assert names, "no case failed"
    return names


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_planted_in_the_reference_is_named(name, tmp_path):
    expected, patterns = PLANTED[name]
    module, changes, _ = MUTANTS[name]
    results = outcomes(planted_reference(tmp_path, {module: changes}), patterns)
    assert set(diagnoses(results)) == {(expected,)}


def test_a_copy_of_the_reference_without_a_fault_conforms(tmp_path):
    results = outcomes(planted_reference(tmp_path, {}), None)
    assert {outcome.status for outcome in results} == {"passed"}


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("HalfSums", "int4_l*/mixed/*,int4_linear/group_128*/*", "low_precision_accumulate"),
        ("HalfSums", "int4_linear/short_sum_64/fp32", "low_precision_accumulate"),
        ("HalfAtomics", "int4_l*/mixed/*,int4_linear/group_128*/*", "low_precision_accumulate"),
        ("ScaleOfX", "int4_linear/scale_*/*", "scale_rounded"),
        ("StaleIds", "int4_lora_linear/replay/*", "stale_adapter_ids"),
        ("EarlierIds", "int4_lora_linear/replay/*", "stale_adapter_ids"),
        ("KeptIds", "int4_lora_linear/mixed/*,shrink/*,expand/*", "stale_adapter_ids"),
        ("LateIds", "int4_lora_linear/mixed/*,int4_lora_linear/bias/*", "stale_adapter_ids"),
        ("MaskedGather", "int4_lora_linear/*/bf16", "masked_by_multiplication"),
        ("FirstGroup", "int4_linear/g_idx*/*", "g_idx_minus_one_indexed"),
    ],
)
def test_a_fault_of_a_kernel_is_named(name, patterns, expected):
    assert set(diagnoses(outcomes(getattr(backends, name)(), patterns))) == {(expected,)}


@pytest.mark.parametrize(
    ("name", "case", "rule", "where"),
    [
        ("OneRow", "int4_linear/many_outputs/bf16", "bound", "outputs 1234 of 4096"),
        ("OneToken", "int4_linear/many_tokens/bf16", "bound", "tokens 3210 of 4096"),
        ("FourBounds", "int4_linear/group_128/bf16", "bound", "tokens 15 of 16, outputs 63 of 64"),
        ("FourBounds", "int4_linear/ragged/fp32", "bound", "tokens 15 of 16, outputs 12 of 13"),
        ("Biased", "int4_lora_linear/mixed/fp32", "rms", ""),
        ("Biased", "int4_lora_linear/bias_of_errors/bf16", "systematic_error", ""),
        ("Biased", "int4_lora_linear/bias_of_errors/fp16", "systematic_error", ""),
        ("Writes", "int4_lora_linear/unmodified/bf16", "modified", ""),
        ("Unsteady", "int4_lora_linear/repeat/fp32", "repeat", "outputs all of 64"),
    ],
)
def test_an_unknown_fault_is_reported_with_its_place(name, case, rule, where):
    (outcome,) = settled(list(run(Backend(getattr(backends, name)(), name), select(case))))
    assert (outcome.status, outcome.rule, outcome.diagnosis) == ("failed", rule, ("unknown",))
    assert where in outcome.where


@pytest.mark.parametrize("case", ["written/bf16", "written/fp32", "mixed/bf16"])
def test_outputs_that_are_never_written_are_found(case):
    backend = Backend(backends.Unwritten(), "under test")
    (outcome,) = settled(list(run(backend, select(f"int4_lora_linear/{case}"))))
    assert outcome.status == "failed"
    assert "outputs 61-63 of 64" in outcome.where


HONEST = [
    "Backwards",
    "SplitSums",
    "Unrounded",
    "BaseRounded",
    "HalfSumsDeclared",
    "UnsteadyDeclared",
    "Prepared",
    "EagerLow",
]


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_backend_conforms(name):
    results = outcomes(getattr(backends, name)(), "*")
    assert [outcome.case for outcome in results if outcome.status == "failed"] == []
    assert any(outcome.status == "passed" for outcome in results)


@pytest.mark.parametrize("name", expert_backends.FAULTS)
def test_a_fault_of_experts_is_named(name):
    results = outcomes(getattr(expert_backends, name)(), "int4_moe/*")
    assert set(diagnoses(results)) == {(expert_backends.FAULTS[name],)}


@pytest.mark.parametrize("name", expert_backends.HONEST)
def test_honest_experts_conform(name):
    backend = Backend(getattr(expert_backends, name)(), name)
    results = list(run(backend, select("int4_moe/*")))
    assert [(r.case, r.message) for r in results if r.status == "failed"] == []
    assert sum(outcome.status == "passed" for outcome in results) > 35


@pytest.mark.parametrize("name", ["Rounded", "Unrounded"])
def test_an_undeclared_rounding_of_experts_fails_and_is_told(name):
    undeclared = type("Undeclared", (getattr(expert_backends, name),), {"manifest": None})
    results = outcomes(undeclared(), "int4_moe/mixed/bf16")
    assert diagnoses(results) == [("unknown",)]
    flag = {"Rounded": "steps_rounded=True", "Unrounded": "weight_rounded=False"}[name]
    assert any(flag in text for text in results[0].variants)


@pytest.mark.parametrize("name", ["Unrounded", "BaseRounded"])
def test_an_undeclared_rounding_fails(name):
    undeclared = type("Undeclared", (getattr(backends, name),), {"manifest": None})
    results = outcomes(undeclared(), "int4_lora_linear/mixed/*,int4_lora_linear/bias/*")
    assert "failed" in {outcome.status for outcome in results}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("nibble_order", "zero_point_sign"),
        ("groups_reversed", "scaling_missing"),
        ("zero_point_axis", "adapter_minus_one_indexed"),
    ],
)
def test_two_faults_at_once_are_named(first, second, tmp_path):
    changed = {}
    for name in (first, second):
        module, changes, _ = MUTANTS[name]
        changed.setdefault(module, {}).update(changes)
    cases = "int4_lora_linear/on_group_32_asym/bf16,int4_lora_linear/on_ragged_asym/bf16"
    results = outcomes(planted_reference(tmp_path, changed), cases)
    assert set(diagnoses(results)) == {(first, second)}
