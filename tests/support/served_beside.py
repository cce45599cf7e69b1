"""vLLM in an environment beside this one, whose Python ``INT4_LORA_VLLM_PYTHON`` names."""

import json
import os
import subprocess
from pathlib import Path

import torch

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


def assert_served_right(model, source, adapters, tmp_path):
    """Serve a model with adapters in mixed rows; hold the answers against transformers and PEFT.

    Args:
        model: the folder that vLLM serves.
        source: the folder that ``truth_and_allowed`` decodes, with the same weights.
        adapters: folders of adapters, by name.
        tmp_path: for the program.

    Returns:
        What vLLM's configuration says: ``is_lora_compatible()`` and the checkpoint's metadata.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, LLAMA["vocab_size"], (4, 9), generator=generator).tolist()
    metadata, answers = _served(model, adapters, prompts, tmp_path)
    truth, allowed = truth_and_allowed(source, list(adapters.values()), prompts)
    right = torch.stack([truth[row % len(truth), row] for row in range(len(prompts))])
    error = (torch.tensor(answers, dtype=torch.float64) - right).abs().amax()
    assert error <= allowed, f"{error:.4f} of {allowed:.4f} nats"
    return metadata


def _served(model, adapters, prompts, tmp_path):
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
