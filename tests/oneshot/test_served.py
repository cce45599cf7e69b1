"""oneshot, annotate, serve: vLLM reads what annotate wrote, and answers are right.

vLLM and llm-compressor need different versions of compressed-tensors, so vLLM is in an environment
of its own, whose Python ``INT4_LORA_VLLM_PYTHON`` names.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from int4_lora.integration import annotate
from support.served_truth import truth_and_allowed
from support.tiny import LLAMA

TESTS = Path(__file__).parents[1]
PYTHON = os.environ.get("INT4_LORA_VLLM_PYTHON")
PROGRAM = """
import json, sys
from support.engines import COLD, engine, logprobs, requests_of

model, adapters, prompts = json.loads(sys.argv[1])
settings = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 16, **COLD}
if __name__ == "__main__":
    requests = [None, *requests_of(adapters).values()]
    rows = [requests[row % len(requests)] for row in range(len(prompts))]
    with engine(model, **settings) as llm:
        config = llm.llm_engine.vllm_config.quant_config
        metadata = [config.is_lora_compatible(), config.lora_compatible, config.lora_target_modules]
        print("FOUND", json.dumps([metadata, logprobs(llm, prompts, rows)]), flush=True)
"""


def served(model, adapters, prompts, tmp_path):
    """Return what vLLM's configuration says, and the log-probabilities of mixed rows."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    folders = {name: str(folder) for name, folder in adapters.items()}
    done = subprocess.run(
        [PYTHON, program, json.dumps([str(model), folders, prompts])],
        env={**os.environ, "PYTHONPATH": str(TESTS), "VLLM_DO_NOT_TRACK": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, (done.stdout + done.stderr)[-4000:]
    return json.loads(lines[0].removeprefix("FOUND "))


@pytest.mark.skipif(PYTHON is None, reason="INT4_LORA_VLLM_PYTHON names no Python with vLLM")
def test_vllm_serves_what_was_annotated(quantised, tiny_adapters, tmp_path):
    if quantised.bits == 8:
        pytest.skip("vLLM has no kernel for 8 bits on a CPU")
    annotated = annotate(quantised.folder)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, LLAMA["vocab_size"], (4, 9), generator=generator).tolist()
    metadata, answers = served(quantised.folder, tiny_adapters, prompts, tmp_path)
    assert metadata == [True, True, list(annotated.lora_target_modules)]
    folders = list(tiny_adapters.values())
    truth, allowed = truth_and_allowed(quantised.folder, folders, prompts)
    right = torch.stack([truth[row % len(truth), row] for row in range(len(prompts))])
    error = (torch.tensor(answers, dtype=torch.float64) - right).abs().amax()
    assert error <= allowed, f"{error:.4f} of {allowed:.4f} nats"
