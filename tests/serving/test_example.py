"""The example runs, and what it prints of the weights is what the checkpoint holds."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from int4_lora.integration.checkpoint.open import open_checkpoint
from int4_lora.reference import dequantize

EXAMPLE = Path(__file__).parents[2] / "examples" / "lora_int4_example.py"


def test_the_example(tiny_models, tiny_adapters):
    model = tiny_models["g128"]
    command = [sys.executable, str(EXAMPLE), "--model", str(model)]
    for name, folder in tiny_adapters.items():
        command += ["--adapter", f"{name}={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    tokens = dict(re.findall(r"^(base|a|b|c): (\[[\d, ]+\])$", done.stdout, re.MULTILINE))
    assert list(tokens) == ["base", "a", "b", "c"]
    assert len(set(tokens.values())) > 1
    parts = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    checkpoint = open_checkpoint(model)
    weight = torch.cat([dequantize(checkpoint.packed_weight(part)) for part in parts])
    printed = re.search(r"qkv_proj: \[(\d+), (\d+)\] in (\S+), largest (\S+)", done.stdout)
    assert printed is not None
    assert [int(printed[1]), int(printed[2])] == list(weight.shape)
    assert printed[4] == f"{weight.abs().max():.4f}"
