"""Backends with two mistakes at once, drawn at random: none may conform."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from int4_lora.reference.conformance import Backend, ask, run, select
from int4_lora.reference.conformance.diagnosis.definition_steps import RIGHT
from int4_lora.reference.conformance.diagnosis.mistakes import MISTAKES
from support.conformance_backends import Stepwise

# those that most mistakes change come first: the first failure ends an example
SENSITIVE = select(
    "dequantize/ragged_asym/bf16,dequantize/g_idx_unbalanced/bf16,dequantize/g_idx_minus_one/bf16,"
    "int4_lora_linear/first_and_last_not_finite/bf16,int4_lora_linear/slices_*/bf16,"
    "int4_lora_linear/on_columns_*/bf16,int4_lora_linear/outputs_200/bf16,"
    "int4_lora_linear/replay/bf16,int4_linear/scale_*/*,int4_lora_linear/tokens_*/bf16"
)
CASES = (*SENSITIVE, *(case for case in select() if case not in SENSITIVE))
TWO = st.lists(
    st.sampled_from(MISTAKES), min_size=2, max_size=2, unique_by=lambda mistake: mistake.step
)


@given(TWO)
def test_no_composition_of_two_mistakes_conforms(mistakes):
    way = RIGHT
    for mistake in mistakes:
        way = mistake.within(way)
    backend = Backend(Stepwise(way), "two mistakes")
    assert any(fails(backend, case) for case in CASES), mistakes


def fails(backend, case):
    if backend.skips(case.function, case.operands(), "cpu"):
        return False
    try:
        return any(asked.finding is not None for asked in ask(case, backend, 0, "cpu"))
    except Exception:
        return True


@pytest.mark.nightly
def test_the_steps_without_a_mistake_conform():
    outcomes = list(run(Backend(Stepwise(RIGHT), "right"), select()))
    assert [outcome.case for outcome in outcomes if outcome.status == "failed"] == []
