"""oneshot, annotate, serve: vLLM reads what annotate wrote, and answers are right.

vLLM is in an environment of its own.
"""

import pytest
import torch

from int4_lora.integration import annotate
from support.served_elsewhere import PYTHON, served
from support.served_truth import truth_and_allowed
from support.tiny import LLAMA


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
