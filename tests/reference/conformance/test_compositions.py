"""Backends with two mistakes at once, drawn at random: none may conform."""

import hypothesis.strategies as st
from hypothesis import given

from int4_lora.reference.conformance import Backend, ask, run, select
from int4_lora.reference.conformance.diagnosis.definition_steps import RIGHT
from int4_lora.reference.conformance.diagnosis.expert_mistakes import EXPERT_MISTAKES
from int4_lora.reference.conformance.diagnosis.mistakes import MISTAKES
from support.conformance_backends import Stepwise
from support.expert_backends import Mistaken

# those that most mistakes change come first: the first failure ends an example
SENSITIVE = select(
    "dequantize/ragged_asym/bf16,dequantize/g_idx_unbalanced/bf16,dequantize/g_idx_minus_one/bf16,"
    "int4_lora_linear/first_and_last_not_finite/bf16,int4_lora_linear/slices_*/bf16,"
    "int4_lora_linear/on_columns_*/bf16,int4_lora_linear/outputs_200/bf16,"
    "int4_lora_linear/replay/bf16,int4_linear/scale_*/*,int4_lora_linear/tokens_*/bf16,"
    "dequantize/*fp4*/*,from_gptq/*,from_awq/*"
)
CASES = (*SENSITIVE, *(case for case in select() if case not in SENSITIVE))
EXPERTS = select("int4_moe/*")


def two(mistakes, key):
    return st.lists(st.sampled_from(mistakes), min_size=2, max_size=2, unique_by=key)


def by_step(mistake):
    return mistake.step


FLOAT4 = [mistake for mistake in MISTAKES if mistake.step.startswith("float4")]


@given(st.one_of(two(MISTAKES, by_step), two(FLOAT4, by_step)))
def test_no_composition_of_two_mistakes_conforms(mistakes):
    way = RIGHT
    for mistake in mistakes:
        way = mistake.within(way)
    backend = Backend(Stepwise(way), "two mistakes")
    assert any(fails(backend, case) for case in CASES), mistakes


@given(two(EXPERT_MISTAKES, lambda mistake: mistake.name))
def test_no_composition_of_two_mistakes_of_experts_conforms(mistakes):
    backend = Backend(Mistaken(mistakes), "two mistakes")
    assert any(fails(backend, case) for case in EXPERTS), mistakes


def fails(backend, case):
    if backend.skips(case.function, case.operands(), "cpu"):
        return False
    try:
        return any(asked.finding is not None for asked in ask(case, backend, 0, "cpu"))
    except Exception:
        return True


def test_the_steps_without_a_mistake_conform():
    """Else the tests above could not fail."""
    for right in (Stepwise(RIGHT), Mistaken(())):
        outcomes = list(run(Backend(right, "right"), select()))
        assert [outcome.case for outcome in outcomes if outcome.status == "failed"] == []
        assert {"passed"} <= {outcome.status for outcome in outcomes}
