"""Serve a model in another environment, whose Python ``INT4_LORA_VLLM_PYTHON`` names.

vLLM and llm-compressor need different versions of compressed-tensors.
"""

import json
import os
import subprocess
from pathlib import Path

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
