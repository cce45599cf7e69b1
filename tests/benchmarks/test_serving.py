"""The serving benchmark without vLLM: workloads, ratios, bars, text. No time is measured."""

import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch):
    """Return a function that imports from ``benchmarks``, which is not part of the wheel."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_workloads_have_a_base_of_the_same_rows(module):
    found = module("serving.workloads").workloads(16)
    assert len({one.name for one in found}) == len(found)
    assert {one.shape for one in found} == {one.shape for one in found if one.mix == "base"}
    for one in found:
        assert one.rows * one.prompt == 512 or one.kind == "decode"
    adapters = {one.name: one.adapters for one in found}
    assert adapters["decode, 1 row, 1 adapter"] == [0]
    assert adapters["decode, 8 rows, 4 adapters"] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert adapters["decode, 16 rows, 16 adapters"] == list(range(16))
    assert adapters["decode, 16 rows, base, 4 at a time"] == [None] * 16
    assert [one.name for one in found if one.at_a_time != one.rows] == [
        "decode, 16 rows, base, 4 at a time"
    ]
    assert [one.mix for one in found if not one.uses_adapters] == [
        *["base"] * 5, "base, 4 at a time",
    ]  # fmt: skip
    assert adapters["prefill, 8 x 64, mixed"] == [0, None, 1, None, 2, None, 3, None]
    assert adapters["prefill, 8 x 64, base"] == [None] * 8


def test_measures_of_a_run(module):
    workloads = module("serving.workloads")
    decode = workloads.Workload("decode", 2, 4, 3, "base")
    found = workloads.measures(decode, [[1.0, 1.5, 2.0], [3.0, 4.0, 5.0]])
    assert found == {"seconds": 5.0, "ttft": 2.0, "itl": 0.75, "tokens_per_second": 6 / 5}
    prefill = workloads.Workload("prefill", 2, 10, 1, "base")
    found = workloads.measures(prefill, [[1.0], [4.0]])
    assert found == {"seconds": 4.0, "ttft": 2.5, "itl": None, "tokens_per_second": 5.0}
    with pytest.raises(ValueError, match=r"3 tokens a row were asked, got \[3, 2\]"):
        workloads.measures(decode, [[1.0, 1.5, 2.0], [3.0, 4.0]])


MACHINE = {
    "date": "2026-11-25", "gpu": None, "cpu": "EPYC", "cores": 2, "threads": 2, "torch": "2.13.0",
    "triton": None, "vllm": "0.32.0", "int4-lora": "0.1.0",
}  # fmt: skip
# The seconds of a run on each engine, with which every bar is just reached
TIMES = {
    ("ours", "prefill, 8 x 64", "base"): 1.0, ("ours", "prefill, 8 x 64", "4 adapters"): 1.112,
    ("stock", "prefill, 8 x 64", "base"): 1.7, ("stock", "prefill, 8 x 64", "4 adapters"): 5.01,
    ("ours", "decode, 8 rows", "base"): 1.0, ("ours", "decode, 8 rows", "4 adapters"): 1.10,
    ("stock", "decode, 8 rows", "4 adapters"): 1.871,
    ("ours", "decode, 16 rows", "base"): 1.0, ("stock", "decode, 16 rows", "base"): 1.0,
    ("ours", "decode, 16 rows", "base, 4 at a time"): 1.0,
    ("ours", "decode, 16 rows", "16 adapters"): 1.08,
    ("ours", "decode, 1 row", "base"): 1.0, ("ours", "decode, 1 row", "1 adapter"): 1.0,
    ("stock", "decode, 1 row", "base"): 2.0, ("stock", "decode, 1 row", "1 adapter"): 2.0,
}  # fmt: skip
SLOWER = [  # a run that becomes slower, and how many bars are then missed
    (("ours", "prefill, 8 x 64", "4 adapters"), 2),
    (("ours", "prefill, 8 x 64", "base"), 1),
    (("ours", "decode, 8 rows", "4 adapters"), 2),
    (("ours", "decode, 16 rows", "base"), 1),
    (("ours", "decode, 16 rows", "16 adapters"), 1),
    (("ours", "decode, 1 row", "base"), 1),
    (("ours", "decode, 1 row", "1 adapter"), 1),
]


def entry(module, key, seconds):
    engine, shape, mix = key
    asked = {(one.shape, one.mix): one for one in module("serving.workloads").workloads(2)}
    workload = asked[shape, mix]
    rate = workload.rows * (workload.prompt if workload.new == 1 else workload.new) / seconds
    measured = {"seconds": seconds, "ttft": seconds, "tokens_per_second": rate}
    measured["itl"] = seconds if workload.new > 1 else None
    tokens = [[7] * workload.new] * workload.rows
    return {
        "engine": engine, "workload": workload, "rounds": [measured] * 5, "cold": measured,
        "tokens": tokens,
    }  # fmt: skip


def found_of(module, times):
    return [entry(module, key, seconds) for key, seconds in times.items()]


def engine_facts(first=1.3, fused=28, cold=70.0, warm=18.0):
    first_requests = [first, *[1.0] * 9]
    return {
        "load_seconds": warm, "load_bytes": {"now": 2**30, "peak": 2**31}, "threads": 2,
        "peak_starts_again": True, "load_graphs": 12,
        "serving_bytes": {"now": 2**30, "peak": 2**30, "graphs": 12},
        "first_requests": first_requests, "log": [f"{fused} of 28 linear layers fused; 1 on"],
        "idle_share": 0.0001, "arguments": {"enable_lora": True},
        "cold": {"load_seconds": cold, "first_requests": first_requests},
    }  # fmt: skip


def facts_of(**ours):
    return {"ours": engine_facts(**ours), "stock": engine_facts(cold=10.0, warm=10.0)}


def missed(module, times, **ours):
    rows = module("serving.bars").judged(found_of(module, times), facts_of(**ours))
    return [row["bar"] for row in rows if not row["reached"]]


def test_bars_that_are_just_reached(module):
    rows = module("serving.bars").judged(found_of(module, TIMES), facts_of())
    assert len(rows) == 14
    assert {row["bar"]: row["ratio"] for row in rows if row["reached"] is not True} == {}


@pytest.mark.parametrize(("slower", "count"), SLOWER, ids=lambda one: str(one))
def test_bars_that_are_just_missed(module, slower, count):
    assert len(missed(module, {**TIMES, slower: 1.01 * TIMES[slower]})) == count


def test_adapters_may_add_their_share_of_the_operations_to_a_prefill(module):
    # of 47.2 million numbers of a layer's bases, and 598,016 of its adapters
    assert round(module("serving.files").adapters_share(2048), 4) == round(598016 / 47185920, 4)
    assert module("serving.bars").BARS[0].most == 1.113


def test_stock_is_never_faster(module):
    key = ("prefill, 8 x 64", "mixed")
    times = {**TIMES, ("ours", *key): 1.01, ("stock", *key): 1.0}
    assert missed(module, times) == ["the least of all: stock over ours"]


def test_starts_are_held_against_those_of_stock(module):
    assert missed(module, TIMES, cold=70.1) == ["cold start, s: ours - stock"]
    assert missed(module, TIMES, warm=18.1) == ["warm start, s: ours - stock"]


def test_first_request_is_held_against_the_tenth(module):
    assert missed(module, TIMES, first=1.31) == [
        "ours, first request over the tenth, cold start",
        "ours, first request over the tenth, warm start",
    ]


def test_nine_tenths_of_the_layers_are_fused(module):
    assert missed(module, TIMES, fused=26) == []
    assert missed(module, TIMES, fused=25) == ["ours, share of the linear layers that are fused"]


def test_what_was_not_measured_is_no_bar_reached(module):
    rows = module("serving.bars").judged(found_of(module, {}), {})
    assert [row["reached"] for row in rows] == [None] * 14
    nan = [bar.reached(float("nan")) for bar in module("serving.bars").BARS]
    assert not any(nan)


def options_of(module, *given):
    return module("serving.__main__").options_of(list(given))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([], None),
        (["--rounds", "5", "--layers", "8"], None),
        (["--rounds", "4"], "they are for 5 rounds or more"),
        (["--layers", "3"], "they are for hidden 2048 with 4 to 8 layers"),
        (["--hidden", "1024"], "they are for hidden 2048 with 4 to 8 layers"),
        (["--max-loras", "16"], "they are for 4 slots"),
        (["--quick"], "they are for hidden 2048 with 4 to 8 layers"),
    ],
)
def test_when_the_bars_hold(module, given, why):
    assert module("serving.bars").not_judged(options_of(module, *given)) == why


@pytest.mark.parametrize(
    "given", [["--hidden", "300"], ["--rounds", "0"], ["--max-loras", "3"], ["--backend", "fast"]]
)
def test_wrong_options_are_refused(module, given, capsys):
    with pytest.raises(SystemExit):
        options_of(module, *given)
    assert given[0] in capsys.readouterr().err


def test_given_options_override_quick(module):
    options = options_of(module, "--quick", "--layers", "3")
    assert (options.layers, options.hidden, options.rounds) == (3, 256, 2)


def test_arguments_of_the_engines(module):
    rounds, options = module("serving.rounds"), options_of(module, "--backend", "compiled")
    stock, ours, without = (rounds.arguments_of(name, options) for name in rounds.ENGINES)
    own = {"quantization": "int4_lora", "additional_config": {"int4_lora": {"backend": "compiled"}}}
    assert ours == {**stock, **own}
    assert "enable_lora" not in without
    assert {key: stock[key] for key in without} == without


def test_what_is_measured_stays_with_the_run(module, monkeypatch, tmp_path):
    rounds = module("serving.rounds")
    monkeypatch.delenv("INT4_LORA_CACHE")
    found = rounds.environment_of(tmp_path)
    assert found["INT4_LORA_CACHE"] == str(tmp_path / "cache")
    assert found["VLLM_CACHE_ROOT"] == str(tmp_path / "vllm")
    monkeypatch.setenv("INT4_LORA_CACHE", "mine")
    assert rounds.environment_of(tmp_path)["INT4_LORA_CACHE"] == "mine"


def test_sizes_of_the_model(module):
    sizes = module("serving.files").llama(2048, 4)
    assert (sizes["intermediate_size"], sizes["num_attention_heads"]) == (5632, 16)
    assert (sizes["num_key_value_heads"], sizes["vocab_size"]) == (8, 8192)
    assert module("serving.files").llama(256, 2)["intermediate_size"] % 128 == 0


def test_report_says_what_was_missed(module):
    found = found_of(module, {**TIMES, ("ours", "decode, 16 rows", "base"): 1.1})
    engines = facts_of()
    text = module("serving.report").report(
        MACHINE, found, engines, options_of(module, "--rounds", "5")
    )
    lines = text.splitlines()
    assert lines[0] == (
        "2026-11-25, EPYC, 2 cores, 2 threads, torch 2.13.0, vllm 0.32.0, int4-lora 0.1.0; a Llama "
        "of 4 layers, hidden 2048, INT4 in groups of 128, bfloat16, adapters of rank 16; "
        "backend auto."
    )
    assert "| the least of all: stock over ours | >= 1.0 | 0.91 | **missed** |" in lines
    assert "| ours, first request over the tenth, cold start | <= 1.3 | 1.30 | reached |" in lines
    assert "| prefill, 8 x 64 | 4 adapters | 1.11 | 2.95 | 4.51 |" in lines
    assert "| decode, 1 row | base | - | - | 2.00 |" in lines
    assert any(line.startswith("| ours | 70.0 | 18.0 | 2048 | 1024 | 1024 | 2 |") for line in lines)
    assert "| prefill, 8 x 64 | base | ours | 512.0 ±0 % | 1000.0 ±0 % | - |" in lines
    assert "- ours logged: 28 of 28 linear layers fused; 1 on" in lines
    assert any(line.startswith("- 4 slots: 16 adapters share them; 4 rows") for line in lines)
    assert text.count("**missed**") == 1
    assert "the times are not valid" not in text


def test_report_names_a_busy_engine_a_cold_run_and_other_tokens(module):
    found = found_of(module, TIMES)
    found[0]["cold"] = {**found[0]["cold"], "seconds": 2.0}
    found[0]["tokens"] = [[8], *found[0]["tokens"][1:]]
    engines = {"stock": {**engine_facts(), "idle_share": 0.5}, "ours": engine_facts()}
    engines["stock"]["peak_starts_again"] = False
    engines["ours"]["load_graphs"] = 10
    options = options_of(module, "--quick", "--max-loras", "16")
    text = module("serving.report").report(MACHINE, found, engines, options)
    assert "- stock was not idle while others ran: the times are not valid" in text
    assert "- ours compiled 2 graphs while it served" in text
    assert "stock compiled" not in text
    assert "- stock: its peak serving includes loading" in text
    assert (
        "- ours: the first, unmeasured run over the median: prefill, 8 x 64, base (2.0)\n" in text
    )
    assert "prefill, 8 x 64, base 88%" in text
    assert "- 16 slots: 16 adapters have a slot each." in text
    assert "The bars are not judged: they are for hidden 2048" in text
    assert "missed" not in text
    assert "reached" not in text


def test_lines_of_the_log(module):
    log = "INFO int4_lora: 8 of 8 fused\nother\n INFO int4_lora: 8 of 8 fused\nx int4_lora: slow\n"
    assert module("serving.rounds").lines_about_us(log) == ["8 of 8 fused", "slow"]
    log = "INFO int4_lora: 16 graphs loaded from /graphs/ab12.pickle\n"
    assert module("serving.rounds").lines_about_us(log) == ["16 graphs loaded from ab12.pickle"]


@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed")
def test_plot(module, tmp_path):
    module("serving.report").plot(found_of(module, TIMES), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_an_earlier_version_is_compared_with_this_one(module):
    key = ("prefill, 8 x 64", "4 adapters")
    times = {**TIMES, ("ours before", *key): 1.5 * TIMES[("ours", *key)]}
    rows = module("serving.bars").ratios(found_of(module, times))
    (row,) = (row for row in rows if (row["shape"], row["mix"]) == key)
    assert row["before over ours"] == 1.5
    assert "| before over ours |" in module("serving.report").ratios_table(found_of(module, times))
    assert "before" not in module("serving.report").ratios_table(found_of(module, TIMES))
