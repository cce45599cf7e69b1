"""``int4-lora demo`` serves its batch through real vLLM."""

import json


def test_both_engines_serve_the_batch(run):
    result = run("--require-vllm", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["served"]
    assert found["why_not"] is None
    stock, ours = found["engines"]
    assert max(ours["errors"]) <= found["allowed"]
    assert max(stock["errors"][1:]) <= found["allowed"]  # the first, base, may get an adapter
    for one in (stock, ours):
        assert one["tokens_per_second"] > 0
        assert 0 < one["first_token_seconds"] < 60
        assert one["peak_bytes"] > 2**27
