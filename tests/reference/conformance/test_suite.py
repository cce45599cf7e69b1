"""The cases: how they are drawn, what they cover, and how they are selected."""

import dataclasses
import hashlib
import re

import pytest
import torch

import int4_lora.reference
from int4_lora.reference import int4_lora_linear
from int4_lora.reference.conformance import CASES, Backend, Manifest, run, select, tensors_of
from int4_lora.reference.conformance.cases.draws import Draws
from int4_lora.reference.conformance.diagnosis.definition_steps import (
    RIGHT,
    answer_of,
    dense_weight,
)
from int4_lora.reference.conformance.diagnosis.expert_mistakes import (
    EXPERT_MISTAKES,
    answer_with,
)
from int4_lora.reference.conformance.diagnosis.mistakes import IDENTIFIERS, MISTAKES
from int4_lora.reference.conformance.judging.answers import answer, exact_answer
from int4_lora.reference.conformance.judging.check import one_thread
from int4_lora.reference.conformance.judging.yardstick import interleaved, one_by_one, yardstick
from support.weights import bits_of

pytestmark = pytest.mark.versions

REGULAR = [case for case in CASES if not case.optional]


def test_draws_are_the_same_everywhere():
    """Against SplitMix64 in Python's integers, whose first number from 0 is published."""
    assert splitmix(0, 1) == 0xE220A8397B1DCDAF
    draws = Draws(7, "case")
    state = int.from_bytes(hashlib.sha256(b"7/case/codes").digest()[:8], "little")
    numbers = [(splitmix(state, index) >> 11) * 2.0**-53 for index in range(1, 101)]
    assert draws.uniform("codes", (4, 25)).flatten().tolist() == numbers
    expected = [int(number * 16) - 8 for number in numbers]
    assert draws.integers("codes", (100,), -8, 7).tolist() == expected
    assert draws.permutation("p", 5).sort().values.tolist() == [0, 1, 2, 3, 4]


def splitmix(state, index):
    """Return the index-th number of SplitMix64."""
    mixed = (state + index * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return mixed ^ (mixed >> 31)


def test_draws_are_uniform_and_normal():
    draws = Draws(1, "case")
    codes = draws.integers("codes", (160_000,), -8, 7)
    counts = torch.stack([(codes == code).sum() for code in range(-8, 8)])
    assert ((counts - 10_000).abs() < 500).all()
    normal = draws.normal("n", (100_000,))
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    other = Draws(2, "case").normal("n", (100_000,))
    assert abs((normal * other).mean()) < 0.02


def test_names_are_unique_and_say_the_function():
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert re.fullmatch(rf"{case.function}/[\w/]+", case.name)
        assert case.exercises


@pytest.mark.parametrize("case", REGULAR, ids=lambda case: case.name)
def test_operands_are_drawn_from_the_seed_and_the_name(case):
    first, again = tensors_of(case.operands(3)), tensors_of(case.operands(3))
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert torch.equal(bits(tensor), bits(again[name]))
    drawn = {name: tensor for name, tensor in first.items() if tensor.numel() > 20}
    other = tensors_of(case.operands(4))
    fixed = case.name in ("pack/all_codes", "unpack/all_codes") or not drawn
    assert fixed or any(not torch.equal(tensor, other[name]) for name, tensor in drawn.items())


def bits(tensor):
    """Return a tensor of floats as integers, so that NaN equals NaN."""
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


@pytest.mark.parametrize("case", REGULAR, ids=lambda case: case.name)
def test_the_steps_are_the_reference(case):
    """The definition in steps, which mistakes are put in, is the definition."""
    if case.function in ("pack", "int4_moe"):
        return
    operands = case.operands()
    exact = exact_answer(case.function, operands).double()
    steps = answer_of(case.function, operands, RIGHT, Manifest(), None).exact.double()
    assert torch.equal(exact.isfinite(), steps.isfinite())
    error = torch.where(exact.isfinite(), (exact - steps).abs(), 0.0)
    held = answer(case.function, operands, Manifest())
    allowed = torch.where(held.bound.isfinite(), held.bound * 1e-6, 1e-9 * (1 + exact.abs()))
    assert (error <= allowed.nan_to_num(posinf=torch.inf)).all()


def test_every_identifier_has_a_mistake_and_every_mistake_changes_something():
    named = {mistake.name for mistake in (*MISTAKES, *EXPERT_MISTAKES)}
    assert named | {"low_precision_accumulate", "unknown"} == set(IDENTIFIERS)
    changed = set()
    for case in select(
        "int4_l*/on_*,int4_l*/g_idx*/bf16,int4_l*/slices*/bf16,int4_l*/scale_*/*,"
        "int4_l*/first_and_last_not_finite/*,from_*/bf16"
    ):
        operands = case.operands()
        right = answer_of(case.function, operands, RIGHT, Manifest(), None).exact
        earlier = None if operands.adapter_ids is None else operands.adapter_ids.flip(0)
        with one_thread():
            wrong = {
                (mistake.name, mistake.variant): answer_of(
                    case.function, operands, mistake.within(RIGHT), Manifest(), earlier
                ).exact
                for mistake in MISTAKES
            }
        changed |= {key for key, other in wrong.items() if not torch.equal(other, right)}
    missing = {(mistake.name, mistake.variant) for mistake in MISTAKES} - changed
    assert {name for name, _ in missing} <= {"tail_lost"}, missing


def test_every_mistake_of_experts_changes_something():
    changed = set()
    cases = ("mixed", "dropped", "same_expert_twice", "g_idx", "large_weights", "group_128_asym")
    for case in select(",".join(f"int4_moe/{name}/bf16" for name in cases)):
        operands = case.operands()
        right = exact_answer(case.function, operands)
        for mistake in EXPERT_MISTAKES:
            wrong = answer_with(mistake, operands, Manifest(), operands.adapter_ids.roll(1))
            if wrong is not None and not torch.equal(wrong.exact, right):
                changed.add((mistake.name, mistake.variant))
    assert changed == {(mistake.name, mistake.variant) for mistake in EXPERT_MISTAKES}


def test_the_eager_yardstick_is_the_declared_order():
    (case,) = select("int4_lora_linear/bias/bf16")
    operands = case.operands()
    held = answer(case.function, operands, Manifest())
    for order in (range, interleaved):
        y = yardstick(case.function, operands, Manifest(), order)
        assert y.dtype == torch.bfloat16
        assert ((y.double() - held.exact).abs() <= held.bound).all()
    rounded = yardstick(case.function, operands, Manifest(base_rounded=True))
    assert not torch.equal(rounded, y)
    x = torch.randn(3, 9)
    w = torch.randn(4, 9)
    torch.testing.assert_close(one_by_one(x, w), x @ w.T)


def test_cases_are_chosen_by_name():
    assert [case.name for case in select("pack/ragged, unpack/r*")] == [
        "pack/ragged",
        "unpack/ragged",
    ]
    assert set(select(quick=True)) < set(select())
    assert not any(case.optional for case in select("*"))
    assert [case.optional for case in select("int4_linear/large_weight/bf16")] == [True]
    for wrong in ("nothing", "pack/ragged,nothing", "", " , "):
        with pytest.raises(ValueError, match="no case is named"):
            select(wrong)


def test_a_weight_in_steps_has_the_references_bits():
    (case,) = select("dequantize/all_codes/fp16")
    weight = case.operands().weight
    dense = dense_weight(RIGHT, weight).to(torch.float16)
    assert torch.equal(bits_of(dense), bits_of(int4_lora.reference.dequantize(weight)))


def test_the_reference_conforms():
    backend = Backend(int4_lora.reference, "reference")
    skipped = {
        outcome.message for outcome in run(backend, select("*/fp64")) if outcome.status == "skipped"
    }
    assert skipped == {"x is float64"}  # what a backend claims that says nothing
    wide = (*backend.manifest.dtypes, torch.float64)
    backend.manifest = dataclasses.replace(backend.manifest, dtypes=wide)
    assert {outcome.status for outcome in run(backend, select())} == {"passed"}


def test_the_reference_conforms_with_seeds_that_nobody_chose():
    backend = Backend(int4_lora.reference, "reference")
    for seed in (1, 20261126):
        failed = [
            outcome
            for outcome in run(backend, select(quick=True), seed=seed)
            if outcome.status != "passed"
        ]
        assert failed == []


def test_operands_of_some_tokens_and_outputs_are_a_part_of_the_answer():
    for name in ("on_ragged_asym/bf16", "slices_qkv/fp32", "bias/fp16", "on_g_idx_unbalanced/bf16"):
        (case,) = select(f"int4_lora_linear/{name}")
        operands = case.operands()
        whole = exact_answer(case.function, operands)
        part = operands.with_outputs(8, 13).with_tokens(torch.tensor([3, 1]))
        assert torch.allclose(exact_answer(case.function, part), whole[[3, 1], 8:13], rtol=1e-12)


def test_adapters_of_the_cases_matter():
    """A delta too small to see would hide every fault of adapters."""
    for case in select("int4_lora_linear/*/bf16", quick=True):
        operands = case.operands()
        if operands.adapter_ids is None or not bool((operands.adapter_ids >= 0).any()):
            continue
        base = int4_lora_linear(operands.x.double(), operands.weight, bias=operands.bias)
        delta = (exact_answer(case.function, operands) - base).abs()
        assert delta.max() > 0.1 * base.abs().mean()
