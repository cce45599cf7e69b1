"""Checkpoints that quantisers wrote: llm-compressor's oneshot, AutoAWQ, AutoRound and GPTQModel."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from int4_lora.integration.demo.tokenizer import save_tokenizer
from support.tiny import LLAMA

GPTQ = {"method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"method": "awq", "bits": 4, "group_size": 32}
OTHERS = {  # checkpoints that are not of compressed-tensors: the tool, and its settings
    "gptqmodel": ("gptqmodel", GPTQ),
    "gptqmodel desc_act": (
        "gptqmodel",
        {**GPTQ, "desc_act": True, "act_group_aware": False, "sym": False, "format": "gptq_v2"},
    ),
    "gptqmodel 8 bits": ("gptqmodel", {**GPTQ, "bits": 8, "group_size": 64}),
    "gptqmodel awq": ("gptqmodel", AWQ),  # symmetric
    "auto_round gptq": ("auto_round", {**GPTQ, "sym": True}),
    "auto_round awq": ("auto_round", {**AWQ, "sym": False}),
    "autoawq": (
        "autoawq",
        {"method": "awq", "zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
    ),
}
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


def lines():
    """Return a text that is here: the longer lines of a page of the documentation."""
    return [line for line in TEXT.read_text(encoding="utf-8").splitlines() if len(line) > 60][:32]


def sentences():
    """Return the text as a data set."""
    import datasets

    return datasets.Dataset.from_dict({"text": lines()})


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


@pytest.fixture(scope="session", params=OTHERS)
def other(request, dense, tmp_path_factory):
    """Return an AWQ or GPTQ checkpoint: its name, method and folder, and its decoded weights."""
    from safetensors.torch import load_file

    tool, settings = OTHERS[request.param]
    root = tmp_path_factory.mktemp("other")
    folder, decoded = root / "written", root / "decoded.safetensors"
    asked = {"tool": tool, "settings": settings, "source": str(dense), "folder": str(folder)}
    asked |= {"text": lines(), "decoded": str(decoded)}
    program = Path(__file__).with_name("quantise.py")
    command = [sys.executable, "-W", "ignore", program, json.dumps(asked)]
    done = subprocess.run(  # in its folder, since GPTQModel writes logs where it runs
        command, cwd=root, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    weights = load_file(decoded)
    return SimpleNamespace(
        name=request.param, method=settings["method"], folder=folder, decoded=weights
    )
