"""``int4-lora demo`` serves its batch through real vLLM."""

import json

import pytest


@pytest.mark.nightly  # in CI ``tox run -e demo`` serves the same batch and judges it
def test_both_engines_serve_the_batch(run):
    result = run("--require-vllm", "--json")
    assert result.exit_code == 0, result.output
    served = json.loads(result.stdout)["served"]
    assert served["why_not"] is None
    stock, ours = served["engines"]
    assert max(ours["errors"]) <= served["allowed"]
    assert max(stock["errors"][1:]) <= served["allowed"]  # the first, base, may get an adapter
    for engine in (stock, ours):
        assert engine["tokens_per_second"] > 0
        assert 0 < engine["first_token_seconds"] < 60
        assert engine["peak_bytes"] > 2**27
