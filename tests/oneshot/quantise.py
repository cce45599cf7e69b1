"""Quantise a small model with AutoAWQ, AutoRound or GPTQModel, and write what a tool decodes.

``python quantise.py JSON``, in a process of its own: the tools change transformers and torch as
they are imported. The JSON object holds ``tool``, ``settings`` (the tool's own), ``source``,
``folder``, ``text`` (lines to calibrate with) and ``decoded``, the file for the decoded weights,
which tools hold as ``[in_features, out_features]``. GPTQ is decoded by GPTQModel, AWQ by AutoAWQ.
"""

import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pool for loading needs two

import torch
from safetensors.torch import load_file, save_file

PARTS = ("qweight", "qzeros", "scales")


def gptqmodel(source, folder, text, method, **settings):
    """Write a checkpoint with GPTQModel."""
    from gptqmodel import AWQConfig, GPTQConfig, GPTQModel

    config = {"gptq": GPTQConfig, "awq": AWQConfig}[method](**settings)
    model = GPTQModel.load(source, config, device="cpu", dtype=torch.bfloat16)
    model.quantize(text, batch_size=4)
    model.save(folder)


def auto_round(source, folder, text, method, **settings):
    """Write a checkpoint with AutoRound's exporters, rounded to nearest."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    quantiser = AutoRound(
        model, tokenizer, iters=0, disable_opt_rtn=True, device_map="cpu", **settings
    )
    quantiser.quantize_and_save(f"{folder}.parts", format=f"auto_{method}")
    (made,) = (file.parent for file in Path(f"{folder}.parts").rglob("config.json"))
    shutil.move(made, folder)


def autoawq(source, folder, text, method, **settings):
    """Write a checkpoint with AutoAWQ."""
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    assert method == "awq"
    model = AutoAWQForCausalLM.from_pretrained(source, device_map="cpu", safetensors=True)
    model.quantize(
        AutoTokenizer.from_pretrained(source),
        quant_config=settings,
        calib_data=[line[:40] for line in text],  # it drops lines of more tokens than a block
        max_calib_seq_len=64,
    )
    model.save_quantized(folder)


def decoded_gptq(folder):
    """Return the dense weight of each module of a GPTQ checkpoint, as GPTQModel computes it."""
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    layers = model.model.named_modules()
    return {name: layer.dequantize_weight() for name, layer in layers if hasattr(layer, "qzeros")}


def decoded_awq(folder):
    """Return the dense weight of each module of an AWQ checkpoint, as AutoAWQ computes it."""
    from awq.utils.packing_utils import dequantize_gemm

    stored = load_file(Path(folder) / "model.safetensors")
    names = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    decoded = {}
    for name in names:
        tensors = [stored[f"{name}.{part}"] for part in PARTS]
        size = tensors[0].shape[0] // tensors[2].shape[0]
        decoded[name] = dequantize_gemm(tensors[0], tensors[1], tensors[2], 4, size)
    return decoded


def main(asked):
    """Write the checkpoint and the decoded weights."""
    tools = {"autoawq": autoawq, "auto_round": auto_round, "gptqmodel": gptqmodel}
    settings = dict(asked["settings"])
    method = settings.pop("method")
    tools[asked["tool"]](asked["source"], asked["folder"], asked["text"], method, **settings)
    decoded = {"awq": decoded_awq, "gptq": decoded_gptq}[method](asked["folder"])
    save_file({name: dense.contiguous() for name, dense in decoded.items()}, asked["decoded"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
