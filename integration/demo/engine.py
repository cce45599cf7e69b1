"""The process that one vLLM engine runs in: what it answers, how fast, with how much memory.

``python -m int4_lora.integration.demo.engine ANSWER`` reads what is asked from standard input, as
JSON, and writes what was found to the file ANSWER. vLLM writes to standard output as it likes.

Source: vLLM's ``LLMEngine.add_request`` and ``step``, which ``LLM.generate`` consists of.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main", "stepped"]

ROUNDS = 3  # measured ones, after one that is not


def main(arguments: Sequence[str]) -> None:
    """Serve what standard input asks for, and write what was found."""
    (answer,) = arguments
    asked = json.load(sys.stdin)
    Path(answer).write_text(json.dumps(_served(asked)), encoding="utf-8")


def stepped(
    llm: Any, name: str, prompts: Sequence[Sequence[int]], adapters: Sequence[Any], sampling: Any
) -> tuple[list[list[float]], list[list[int]], list[Any]]:
    """Run requests that are there at once; the engine is stepped here, to time every token.

    Args:
        llm: vLLM's ``LLM``.
        name: of the requests, not used before.
        prompts: the tokens of each.
        adapters: vLLM's request for the adapter of each, or None.
        sampling: vLLM's ``SamplingParams``, with outputs that hold what is new.

    Returns:
        For each request the seconds after the start at which each token was there, the tokens, and
        the last output.
    """
    core, places = llm.llm_engine, {}
    started = time.perf_counter()
    for row, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        places[f"{name}-{row}"] = row
        given = {"prompt_token_ids": list(prompt)}
        core.add_request(f"{name}-{row}", given, sampling, lora_request=adapter)
    times: list[list[float]] = [[] for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    outputs: list[Any] = [None for _ in prompts]
    while core.has_unfinished_requests():
        for output in core.step():
            new, row = list(output.outputs[0].token_ids), places[output.request_id]
            times[row] += [time.perf_counter() - started] * len(new)
            tokens[row] += new
            outputs[row] = output
    return times, tokens, outputs


def _served(asked: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(asked["model"], **asked["arguments"])
    requests = [
        None if folder is None else LoRARequest(f"adapter{row}", row + 1, folder)
        for row, folder in enumerate(asked["adapters"])
    ]
    settings = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    delta = RequestOutputKind.DELTA
    many = SamplingParams(max_tokens=asked["new"], output_kind=delta, **settings)
    rounds = []
    for number in range(1 + ROUNDS):
        times, _, _ = stepped(llm, f"r{number}", asked["prompts"], requests, many)
        rounds.append(times)
    measured = rounds[1:]
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    one = SamplingParams(max_tokens=1, logprobs=vocabulary, output_kind=delta, **settings)
    _, _, outputs = stepped(llm, "next", asked["prompts"], requests, one)
    total = asked["new"] * len(requests)
    return {
        "tokens_per_second": total / statistics.median(max(map(max, times)) for times in measured),
        "first_token_seconds": statistics.median(
            statistics.median(row[0] for row in times) for times in measured
        ),
        "peak_bytes": _peak_bytes(),
        "logprobs": [_in_order(output.outputs[0].logprobs[0], vocabulary) for output in outputs],
    }


def _in_order(logprobs: dict[int, Any], vocabulary: int) -> list[float | None]:
    """Return the log-probability of each token, None for one that is no number."""
    values = [logprobs[token].logprob for token in range(vocabulary)]
    return [value if math.isfinite(value) else None for value in values]


def _peak_bytes() -> int | None:
    """Return the most bytes that the process held, on a GPU those of its memory; None if unknown.

    ``VmHWM`` counts from this program's start; what ``getrusage`` tells survives an exec.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(lines[0].split()[1]) if lines else None


if __name__ == "__main__":
    main(sys.argv[1:])
