"""Engines of real vLLM on tiny INT4 models, and what they are asked.

Importing this imports no vLLM, and sets what vLLM reads from the environment where it is unset.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that tests can inspect the layers
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # other tests run beside this one
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 512  # of the tiny models
FLAG = {"quantization": "int4_lora"}
COMPILED = {**FLAG, "additional_config": {"int4_lora": {"backend": "compiled"}}}
COLD = {**FLAG, "additional_config": {"int4_lora": {"backend": "compiled", "warm_up": False}}}

WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}


@contextlib.contextmanager
def engine(model, **settings):
    """Start an engine without vLLM's own compile; end it with all that it leaves behind."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        llm = LLM(
            str(model),
            **{
                "dtype": "bfloat16",
                "skip_tokenizer_init": True,
                "max_model_len": 128,
                "max_num_batched_tokens": 512,
                "enable_prefix_caching": False,
                "enforce_eager": True,
                "max_logprobs": -1,  # all
                "seed": 0,
                **settings,
            },
        )
    except Exception:  # a start that is refused late leaves process groups behind
        cleanup_dist_env_and_memory()
        raise
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def layers_of(llm):
    """Return the modules of an engine in this process, by name."""
    layers = {}
    llm.apply_model(lambda model: layers.update(model.named_modules()))
    return layers


def requests_of(adapters):
    """Return vLLM's request for each adapter, by name."""
    from vllm.lora.request import LoRARequest

    return {
        name: LoRARequest(name, number, str(folder))
        for number, (name, folder) in enumerate(adapters.items(), start=1)
    }


def logprobs(llm, prompts, adapters):
    """Return the log-probability of each token of each prompt after the first, teacher-forced.

    Every beginning of a prompt is a request of its own: with adapters, vLLM's CPU backend gives no
    log-probabilities of prompts.
    """
    beginnings, requests, next_tokens = [], [], []
    for prompt, adapter in zip(prompts, adapters, strict=True):
        for end in range(1, len(prompt)):
            beginnings.append(prompt[:end])
            requests.append(adapter)
            next_tokens.append(prompt[end])
    rows = next_logprobs(llm, beginnings, requests)
    each = [row[token] for row, token in zip(rows, next_tokens, strict=True)]
    length = len(prompts[0]) - 1
    return [each[start : start + length] for start in range(0, len(each), length)]


def next_logprobs(llm, prompts, adapters):
    """Return the log-probabilities of the whole vocabulary after each prompt."""
    return [steps[0] for _, steps in generated(llm, prompts, adapters, tokens=1)]


def generated(llm, prompts, adapters, tokens=8):
    """Return the tokens of a greedy answer to each prompt, and every log-probability on the way."""
    from vllm import SamplingParams

    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    sampling = SamplingParams(
        max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=vocabulary
    )
    given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs = llm.generate(given, sampling, lora_request=adapters, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    return [
        (
            list(answer.token_ids),
            [[step[token].logprob for token in range(vocabulary)] for step in answer.logprobs],
        )
        for answer in answers
    ]


PROGRAM = """
import json, sys
from support import engines

def main():
    asked = json.loads(sys.argv[1])
    requests = [None, *engines.requests_of(asked["adapters"]).values()]
    with engines.engine(asked["model"], **asked["settings"]) as llm:
        rows = [requests[number % len(requests)] for number in range(len(asked["prompts"]))]
        answers = getattr(engines, asked["function"])(llm, asked["prompts"], rows)
        print("ANSWERS", json.dumps(answers), flush=True)

if __name__ == "__main__":
    main()
"""


def run_in_process(tmp_path, model, adapters, prompts, settings, function="logprobs", **env):
    """Return what a function of this file returns in a process of its own, and the whole output.

    Prompt 0 is asked without an adapter, the next ones with the adapters in turn.
    """
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    asked = {
        "model": str(model),
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "prompts": prompts,
        "settings": settings,
        "function": function,
    }
    path = os.pathsep.join([str(tmp_path), *(folder for folder in sys.path if folder)])
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    output = done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    return (json.loads(lines[0].removeprefix("ANSWERS ")) if lines else None), output


@contextlib.contextmanager
def one_rank(folder):
    """Let layers be built without an engine: a configuration, and one process that is all ranks."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder / 'store'}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        cleanup_dist_env_and_memory()
