"""Whose code computes the base and the adapters, from tables of times; without vLLM."""

import itertools

import pytest

from int4_lora.compiled.graphs.cache import bucket_of
from int4_lora.integration.vllm_plugin.base_choice import (
    ADAPTERS,
    BASES,
    FAVOURED,
    LAYER,
    MANY_TOKENS,
    SHARED_BASE,
    STOCK_ADAPTERS,
    TOKENS,
    VLLM,
    Choice,
    Plan,
    choose,
)

FAST_DECODE = (0.4, 0.5, 0.7, 0.8, 0.9, 1.2, 1.1, 1.0)  # ours over vLLM's, from 1 to 512 tokens
NAMES = {
    "shared": SHARED_BASE,
    "layer": LAYER,
    "added": ADAPTERS,
    "stock_adapters": STOCK_ADAPTERS,
}


class Table:
    """Times as functions of the number of tokens; notes what was asked for."""

    def __init__(self, stock=1.0, **others):
        self.times = {BASES[0]: 1.0, BASES[1]: stock}
        self.times |= {NAMES[name]: times for name, times in others.items()}
        self.asked = []

    def __call__(self, names, tokens):
        self.asked += names
        given = {name: self.times[name] for name in names if name in self.times}
        return {name: times(tokens) if callable(times) else times for name, times in given.items()}


def few_and_many(few, many):
    return lambda tokens: few if tokens <= 32 else many


def expected(few, many, favour, copies):
    """Return the plan where vLLM's base takes ``few`` or ``many`` of our time."""
    if few > 1 and many > 1:
        return Plan()
    if few < 1 and many < 1:
        return Plan(VLLM)
    if few < 1:  # ours for many tokens reads vLLM's layout
        if copies == 1:
            return Plan(VLLM, ours_from=33)
        return Plan() if favour == "prefill" else Plan(VLLM)
    return Plan(VLLM) if favour == "prefill" else Plan()  # ours for few reads a layout of its own


@pytest.mark.parametrize(
    ("few", "many", "favour", "copies"),
    list(itertools.product((0.7, 1.4), (0.7, 1.4), FAVOURED, (1, 2))),
)
def test_who_is_faster_at_few_tokens_and_at_many(few, many, favour, copies):
    shared = {"shared": 1.0} if copies == 1 else {}
    choice = choose(Table(few_and_many(few, many), **shared), favour)
    assert choice.plan == expected(few, many, favour, copies)
    assert (choice.reason is None) == (choice.plan == Plan())


def test_a_copy_that_serves_both_is_measured_only_where_it_may_be_chosen():
    asked = {}
    for few, many in itertools.product((0.7, 1.4), repeat=2):
        table = Table(few_and_many(few, many), shared=1.0)
        choose(table)
        asked[few, many] = SHARED_BASE in table.asked
    assert asked == {(0.7, 0.7): False, (0.7, 1.4): True, (1.4, 0.7): False, (1.4, 1.4): False}


def test_ours_begins_where_it_is_faster_on_vllms_layout():
    stock = lambda tokens: 0.5 if tokens <= 64 else 3.0  # noqa: E731
    choice = choose(Table(stock, shared=1.1))
    assert choice.plan == Plan(VLLM, ours_from=65)
    assert choice.description(0) == (
        "base by vLLM up to 64 tokens and by int4_lora above, from one copy: "
        "1.81 x as fast as with int4_lora's base on average of 1 to 512 tokens "
        "(2.00 x at 1, 0.91 x at 512)"
    )
    slow = choose(Table(stock, shared=4.0))  # ours is slow there
    assert slow.plan == Plan(VLLM)


@pytest.mark.parametrize(
    ("ratios", "reason"),
    [
        (FAST_DECODE, None),
        ((1.04,) * 8, None),
        ((1.06,) * 8, "measured 1.06 x faster on average of 1 to 512 tokens"),
        ((0.9, *[1.2] * 7), "measured 1.16 x faster on average of 1 to 512 tokens"),
        ((*FAST_DECODE[:-1], 1.6), "measured 1.60 x faster at 512 tokens"),
    ],
)
def test_one_slow_number_of_tokens_does_not_decide_unless_it_is_very_slow(ratios, reason):
    by_tokens = dict(zip(TOKENS, ratios, strict=True))
    choice = choose(Table(lambda tokens: 1 / by_tokens[tokens]))
    assert choice.reason == reason
    assert choice.plan == (Plan() if reason is None else Plan(VLLM))


def test_what_is_not_favoured_does_not_decide_however_slow():
    by_tokens = dict(zip(TOKENS, (*FAST_DECODE[:-1], 9.0), strict=True))
    slow_at_512 = Table(lambda tokens: 1 / by_tokens[tokens])
    assert choose(slow_at_512, "decode").plan == Plan()
    assert choose(slow_at_512, "prefill").plan == Plan(VLLM)
    assert choose(slow_at_512, "prefill").reason.endswith("on average of 64 to 512 tokens")
    assert "on average of 1 to 32 tokens" in choose(slow_at_512, "decode").worth


def test_what_is_not_favoured_decides_between_equals():
    equal_at_few = Table(few_and_many(1.0, 0.5))
    assert choose(equal_at_few, "decode").plan == Plan(VLLM)


def test_ours_names_its_worth():
    choice = choose(Table(few_and_many(2.0, 1.25)))
    assert choice == Choice(worth=choice.worth)
    assert choice.description(4) == (
        "base by int4_lora, adapters by int4_lora: 1.78 x as fast as with vLLM's base on average "
        "of 1 to 512 tokens (2.00 x at 1, 1.25 x at 512)"
    )
    assert "adapters" not in choice.description(0)


@pytest.mark.parametrize(
    ("added", "plan"), [(0.1, Plan(VLLM)), (0.6, Plan())], ids=["cheap", "expensive"]
)
def test_adapters_on_vllms_base_cost_more_than_in_one_graph(added, plan):
    """VLLM's base is faster alone; with adapters it depends on what adding them takes."""
    table = Table(0.85, layer=1.05, added=added)
    assert choose(table, slots=4).plan == plan
    assert choose(table, slots=0).plan == Plan(VLLM)


@pytest.mark.parametrize(
    ("stock", "slots", "stock_adapters", "measured"),
    [
        (2.0, 4, False, False),  # ours is faster everywhere, and no other adapters may be taken
        (0.8, 4, False, True),
        (2.0, 4, True, True),
        (0.8, 0, False, False),
    ],
)
def test_adapters_are_measured_where_they_may_matter(stock, slots, stock_adapters, measured):
    table = Table(stock, layer=1.1, added=0.1, stock_adapters=0.1)
    choose(table, slots=slots, stock_adapters=stock_adapters)
    assert (ADAPTERS in table.asked) == measured
    assert (STOCK_ADAPTERS in table.asked) == stock_adapters


@pytest.mark.parametrize(
    ("stock", "layer", "plan"),
    [
        (2.0, 1.6, Plan(adapters=VLLM)),  # vLLM's adapters on our base
        (0.5, 1.6, Plan(VLLM, adapters=VLLM)),
        (2.0, 1.1, Plan()),
    ],
)
def test_vllms_adapters_where_they_are_faster(stock, layer, plan):
    table = Table(stock, layer=layer, added=layer - 1, stock_adapters=0.2)
    choice = choose(table, slots=4, stock_adapters=True)
    assert choice.plan == plan
    if plan == Plan(adapters=VLLM):
        assert "as fast as with int4_lora's adapters" in choice.description(4)


def test_vllms_adapters_that_do_not_run_are_not_taken():
    table = Table(2.0, layer=1.6, added=0.6)
    assert choose(table, slots=4, stock_adapters=True).plan == Plan()


def test_many_tokens_are_a_bucket_of_graphs():
    """No graph for few tokens is compiled for the sake of many."""
    assert bucket_of(MANY_TOKENS)[0] == MANY_TOKENS
