"""vLLM's CPU operators and our layer in vLLM, held against the reference."""

import torch

from int4_lora.integration.conformance import load_backend
from int4_lora.reference.conformance import run, select, settled

CASES = (
    "int4_linear/group_128/bf16,int4_linear/group_32_asym/bf16,int4_lora_linear/mixed/bf16,"
    "int4_lora_linear/one_used/bf16,int4_lora_linear/slices_qkv/bf16"
)


def outcomes(name):
    settled_outcomes = settled(list(run(load_backend(name), select(CASES))))
    return {outcome.case: (outcome.status, outcome.diagnosis) for outcome in settled_outcomes}


def test_base_rows_of_mixed_batches_get_an_adapter_from_vllms_cpu_operators():
    right, wrong = ("passed", ()), ("failed", ("adapter_minus_one_indexed",))
    found = outcomes("vllm_cpu")
    base = {found.pop("int4_linear/group_128/bf16"), found.pop("int4_linear/group_32_asym/bf16")}
    if torch.cpu._is_avx512_bf16_supported():
        assert base == {right}
    else:  # without these instructions vLLM's base is less precise
        assert base <= {right, ("failed", ("low_precision_accumulate",))}
    assert found == {
        "int4_lora_linear/mixed/bf16": wrong,
        "int4_lora_linear/one_used/bf16": right,
        "int4_lora_linear/slices_qkv/bf16": wrong,
    }


def test_our_layer_conforms():
    assert set(outcomes("vllm_plugin").values()) == {("passed", ())}
