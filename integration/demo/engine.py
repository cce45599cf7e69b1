"""Run one vLLM engine in a separate process; measure its answers, speed and memory.

``python -m int4_lora.integration.demo.engine ANSWER`` reads a request in JSON from standard input
and writes the answer to the file ANSWER, because vLLM prints to standard output.

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

ROUNDS = 3  # measured, after one warm-up round


def main(arguments: Sequence[str]) -> None:
    """Serve the request from standard input, and write the answer."""
    (answer,) = arguments
    request = json.load(sys.stdin)
    Path(answer).write_text(json.dumps(_serve(request)), encoding="utf-8")


def stepped(
    llm: Any, name: str, prompts: Sequence[Sequence[int]], adapters: Sequence[Any], sampling: Any
) -> tuple[list[list[float]], list[list[int]], list[Any]]:
    """Serve requests that arrive together, stepping the engine so that every token is timed.

    Args:
        llm: vLLM's ``LLM``.
        name: a prefix of the request ids; it must differ in every call.
        prompts: the tokens of each request.
        adapters: vLLM's ``LoRARequest`` for each request, or None.
        sampling: vLLM's ``SamplingParams``, with delta outputs.

    Returns:
        Three lists, with one entry for each request: the seconds from the start to each token, the
        tokens, and the last output.
    """
    core, row_of = llm.llm_engine, {}
    started = time.perf_counter()
    for row, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        row_of[f"{name}-{row}"] = row
        tokens_prompt = {"prompt_token_ids": list(prompt)}
        core.add_request(f"{name}-{row}", tokens_prompt, sampling, lora_request=adapter)
    times: list[list[float]] = [[] for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    outputs: list[Any] = [None for _ in prompts]
    while core.has_unfinished_requests():
        for output in core.step():
            new, row = list(output.outputs[0].token_ids), row_of[output.request_id]
            times[row] += [time.perf_counter() - started] * len(new)
            tokens[row] += new
            outputs[row] = output
    return times, tokens, outputs


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    """Serve a request's batch in timed rounds, then once for the log-probability of every token."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(request["model"], **request["arguments"])
    adapters = [
        None if folder is None else LoRARequest(f"adapter{row}", row + 1, folder)
        for row, folder in enumerate(request["adapters"])
    ]
    settings = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    delta = RequestOutputKind.DELTA
    answer = SamplingParams(max_tokens=request["new"], output_kind=delta, **settings)
    rounds = []
    for number in range(1 + ROUNDS):
        times, _, _ = stepped(llm, f"r{number}", request["prompts"], adapters, answer)
        rounds.append(times)
    measured = rounds[1:]
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    next_token = SamplingParams(max_tokens=1, logprobs=vocabulary, output_kind=delta, **settings)
    _, _, outputs = stepped(llm, "next", request["prompts"], adapters, next_token)
    total = request["new"] * len(adapters)
    return {
        "tokens_per_second": total / statistics.median(max(map(max, times)) for times in measured),
        "first_token_seconds": statistics.median(
            statistics.median(row[0] for row in times) for times in measured
        ),
        "peak_bytes": _peak_bytes(),
        "logprobs": [_in_order(output.outputs[0].logprobs[0], vocabulary) for output in outputs],
    }


def _in_order(logprobs: dict[int, Any], vocabulary: int) -> list[float | None]:
    """Return the log-probability of each token, or None where it is not finite."""
    values = [logprobs[token].logprob for token in range(vocabulary)]
    return [value if math.isfinite(value) else None for value in values]


def _peak_bytes() -> int | None:
    """Return the peak memory of the process, or on a GPU of its GPU memory; None if unknown.

    ``VmHWM`` starts at zero in a new program, unlike the peak of ``getrusage``, which survives an
    exec.
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
