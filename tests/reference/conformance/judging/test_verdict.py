"""The verdict: each rule rejects the results that it is meant to reject."""

import math

import pytest
import torch

from int4_lora.reference.conformance.judging.answers import Answer
from int4_lora.reference.conformance.judging.systematic_error import systematic_error
from int4_lora.reference.conformance.judging.verdict import judge, rms_of

pytestmark = pytest.mark.versions

EXACT = torch.linspace(1, 2, 1024, dtype=torch.float64).reshape(32, 32)
ANSWER = Answer(EXACT, torch.float32, torch.full_like(EXACT, 1e-3), (EXACT,))
RIGHT = EXACT.float()


def rule(result, answer=ANSWER, *, equal=False, yardstick=None):
    finding = judge(result, answer, equal=equal, yardstick=yardstick)
    return None if finding is None else finding.rule


def changed(value, at=(3, 5)):
    result = RIGHT.clone()
    result[at] = value
    return result


def test_a_right_result_passes():
    assert rule(RIGHT) is None
    assert rule(RIGHT, yardstick=2e-8) is None


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (None, "form"),
        ([1.0], "form"),
        (RIGHT.double(), "form"),
        (RIGHT[:, :31], "form"),
        (RIGHT.to("meta"), "form"),
        (changed(math.nan), "class"),
        (changed(math.inf), "class"),
        (changed(-math.inf), "class"),
        (changed(RIGHT[3, 5] + 1.1e-3), "bound"),
        (changed(RIGHT[3, 5] - 1.1e-3), "bound"),
        (changed(0.0), "bound"),
        (changed(-RIGHT[3, 5]), "bound"),
    ],
)
def test_one_wrong_element_is_found(result, expected):
    assert rule(result) == expected


def test_a_finding_says_which_element_and_how_far():
    finding = judge(changed(9.0), ANSWER, equal=False, yardstick=None)
    assert finding.wrong.nonzero().tolist() == [[3, 5]]
    assert "1 of 1024 elements are wrong; [3, 5] is 9.0" in finding.message
    assert "bounds away" in finding.message


def test_the_rms_rule_needs_elements_enough_and_a_yardstick():
    shifted = RIGHT + 5e-4
    assert rule(shifted) is None
    assert rule(shifted, yardstick=4e-4) is None
    assert rule(shifted, yardstick=2e-4) == "rms"
    assert rule(shifted, yardstick=0.0) == "rms"
    few = Answer(EXACT[:4], torch.float32, ANSWER.bound[:4], (EXACT[:4],))
    assert rule(shifted[:4], few, yardstick=1e-9) is None


def test_where_equality_is_demanded_a_bound_does_not_help():
    assert rule(changed(RIGHT[3, 5] * (1 + 2**-22)), equal=True) == "equal"
    assert (
        rule(RIGHT, Answer(RIGHT.double(), torch.float32, ANSWER.bound, (EXACT,)), equal=True)
        is None
    )


def test_weights_are_equal_up_to_the_sign_of_zero_and_nan_is_nan():
    weight = torch.tensor([[-0.0, math.nan, math.inf, 1.0]])
    answer = Answer(weight, torch.float32, torch.zeros(1, 4, dtype=torch.float64), (weight,))
    assert rule(weight.clone(), answer) is None
    assert rule(torch.tensor([[0.0, math.nan, math.inf, 1.0]]), answer) == "equal"
    assert rule(torch.tensor([[-0.0, 0.0, math.inf, 1.0]]), answer) == "class"
    assert rule(torch.tensor([[-0.0, math.nan, -math.inf, 1.0]]), answer) == "class"


def test_integers_are_equal():
    codes = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
    answer = Answer(codes, torch.int8, torch.zeros(2, 8, dtype=torch.float64), (codes,))
    assert rule(codes.clone(), answer) is None
    assert rule(codes + 1, answer) == "equal"
    assert rule(codes.int(), answer) == "form"


def test_results_beyond_the_largest_number_are_infinite_with_their_sign():
    exact = torch.tensor([[7e4, -7e4, 65519.0, 6e4]], dtype=torch.float64)
    bound = torch.full_like(exact, math.inf)
    answer = Answer(exact, torch.float16, bound, (exact,))
    inf = math.inf
    assert rule(torch.tensor([[inf, -inf, inf, 6e4]]).half(), answer) is None
    assert rule(torch.tensor([[inf, -inf, 65504.0, 6e4]]).half(), answer) is None
    assert rule(torch.tensor([[65504.0, -inf, inf, 6e4]]).half(), answer) == "class"
    assert rule(torch.tensor([[inf, inf, inf, 6e4]]).half(), answer) == "class"
    assert rule(torch.tensor([[math.nan, -inf, inf, 6e4]]).half(), answer) == "class"


def test_errors_that_go_one_way_are_systematic():
    generator = torch.Generator().manual_seed(0)
    noise = (torch.rand(40_000, generator=generator, dtype=torch.float64) - 0.5) * 1.8
    exact = torch.where(torch.arange(40_000) % 2 == 0, 1.0, -1.0).double()
    bounds = torch.ones(40_000, dtype=torch.float64)
    assert systematic_error(noise, exact, bounds) is None
    assert systematic_error(noise + 0.1, exact, bounds).rule == "systematic_error"
    assert systematic_error(noise - 0.1, exact, bounds).rule == "systematic_error"
    outwards = systematic_error(noise + 0.1 * exact, exact, bounds)
    assert "outwards" in outwards.message
    assert systematic_error(noise[:1], exact[:1], bounds[:1]) is None


def test_infinite_and_zero_bounds_do_not_count_as_systematic():
    bounds = torch.tensor([math.inf, 0.0, 1.0, 1.0], dtype=torch.float64)
    errors = torch.tensor([5.0, 5.0, 0.1, -0.1], dtype=torch.float64)
    assert systematic_error(errors, torch.ones(4), bounds) is None


def test_the_rms_of_nothing_is_zero():
    assert rms_of(torch.zeros(0, 4)) == 0.0
    assert rms_of(torch.tensor([3.0, -3.0])) == 3.0
