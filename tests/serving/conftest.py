"""Engines of real vLLM on tiny INT4 models; only where vLLM is installed."""

import contextlib
import gc
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the layers can be looked at
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    """Let vLLM and what it imports warn."""
    for item in items:
        if item.path.parent.name == "serving":
            item.add_marker(pytest.mark.filterwarnings("default"))


VOCABULARY = 512  # of the tiny models
COMPILED = {
    "quantization": "int4_lora",
    "additional_config": {"int4_lora": {"backend": "compiled"}},
}


WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}


@contextlib.contextmanager
def engine(model, **settings):
    """Start an engine and end it, with what it leaves in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(model),
        **{
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "max_model_len": 128,
            "max_num_batched_tokens": 512,
            "enable_prefix_caching": False,
            "max_logprobs": VOCABULARY,
            "seed": 0,
            **settings,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def requests_of(adapters):
    """Return vLLM's request for each adapter, by name."""
    from vllm.lora.request import LoRARequest

    return {
        name: LoRARequest(name, number, str(folder))
        for number, (name, folder) in enumerate(adapters.items(), start=1)
    }


def logprobs(llm, prompts, adapters):
    """Return the log-probability of each token of each prompt after the first, teacher-forced.

    Every beginning of a prompt is a request of its own: with adapters vLLM's CPU backend gives no
    log-probabilities of prompts.
    """
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=1, logprobs=VOCABULARY, detokenize=False)
    given, requests, wanted = [], [], []
    for prompt, adapter in zip(prompts, adapters, strict=True):
        for end in range(1, len(prompt)):
            given.append({"prompt_token_ids": list(prompt[:end])})
            requests.append(adapter)
            wanted.append(prompt[end])
    found = llm.generate(given, asked, lora_request=requests, use_tqdm=False)
    each = [
        one.outputs[0].logprobs[0][token].logprob for one, token in zip(found, wanted, strict=True)
    ]
    length = len(prompts[0]) - 1
    return [each[start : start + length] for start in range(0, len(each), length)]


def generated(llm, prompts, adapters):
    """Return the tokens of a greedy answer to each prompt, and every log-probability on the way."""
    from vllm import SamplingParams

    asked = SamplingParams(
        max_tokens=8, temperature=0, ignore_eos=True, detokenize=False, logprobs=VOCABULARY
    )
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = llm.generate(given, asked, lora_request=adapters, use_tqdm=False)
    each = [one.outputs[0] for one in found]
    return [
        (
            list(one.token_ids),
            [[step[token].logprob for token in range(VOCABULARY)] for step in one.logprobs],
        )
        for one in each
    ]


PROGRAM = """
import json, sys
from serving import conftest

def main():
    asked = json.loads(sys.argv[1])
    requests = [None, *conftest.requests_of(asked["adapters"]).values()]
    with conftest.engine(asked["model"], **asked["settings"]) as llm:
        rows = [requests[number % len(requests)] for number in range(len(asked["prompts"]))]
        found = getattr(conftest, asked["what"])(llm, asked["prompts"], rows)
        print("FOUND", json.dumps(found), flush=True)

if __name__ == "__main__":
    main()
"""


def run(tmp_path, model, adapters, prompts, settings, what="logprobs", **environment):
    """Return what a function of this file finds in a program of its own, and all that it says."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    asked = {
        "model": str(model),
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "prompts": prompts,
        "settings": settings,
        "what": what,
    }
    path = os.pathsep.join([str(tmp_path), *(one for one in sys.path if one)])
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    said = done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return (json.loads(found[0].removeprefix("FOUND ")) if found else None), said


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Let layers be built without an engine: a configuration, and one process that is all ranks."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    store = tmp_path_factory.mktemp("rank") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def prompts():
    """Return prompts of 33 tokens: 32 of them are predicted."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (4, 33), generator=generator).tolist()


def layers_of(llm):
    """Return the modules of an engine in this process, by name."""
    found = {}
    llm.apply_model(lambda model: found.update(model.named_modules()))
    return found
