"""Checkpoints that llm-compressor's ``oneshot`` wrote, annotated; only where it is installed."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from int4_lora.integration.demo.tokenizer import save_tokenizer
from support.tiny import LLAMA

TEXT = Path(__file__).parents[2] / "docs" / "format.md"


def pytest_collection_modifyitems(items):
    """Let transformers warn of how oneshot uses it."""
    for item in items:
        if item.path.parent.name == "oneshot":
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning:transformers"))


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """Return the folder of a small Llama in bfloat16 with a tokenizer; oneshot reads from there."""
    import torch
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    config = transformers.LlamaConfig(**LLAMA)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder, length=128)
    return folder


def sentences():
    """Return a small data set that is here: the longer lines of a page of the documentation."""
    import datasets

    lines = [line for line in TEXT.read_text(encoding="utf-8").splitlines() if len(line) > 60]
    return datasets.Dataset.from_dict({"text": lines[:32]})


def recipe(name):
    """Return what ``oneshot`` is called with, beside the model, and bits and symmetry of it."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    usual = {"targets": "Linear", "ignore": ["lm_head"]}
    if name == "GPTQ":
        calibration = {"dataset": sentences(), "num_calibration_samples": 32, "max_seq_length": 64}
        return {"recipe": GPTQModifier(scheme="W4A16_ASYM", **usual), **calibration}, 4, False
    bits = 8 if name == "W8A16" else 4
    return (
        {"recipe": QuantizationModifier(scheme=name, **usual)},
        bits,
        not name.endswith("_ASYM"),
    )


@pytest.fixture(scope="session", params=["W4A16", "W4A16_ASYM", "GPTQ", "W8A16"])
def quantised(request, dense, tmp_path_factory):
    """Return a checkpoint as ``oneshot`` leaves it: its name, folder, bits and symmetry."""
    import torch
    import transformers
    from llmcompressor import oneshot

    arguments, bits, symmetric = recipe(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "written"
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    model = oneshot(model=model, **arguments)
    model.save_pretrained(folder, save_compressed=True)
    return SimpleNamespace(name=request.param, folder=folder, bits=bits, symmetric=symmetric)
