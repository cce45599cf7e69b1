"""torchao's int4 weight-only linear, in each of its packings for CUDA.

torchao quantises the dense weight by each group's minimum and maximum; on these operands this gives
the same levels. "tile_packed_to_4d" calls torch's operator; the other two packings need the package
``mslk`` (``fbgemm-gpu-genai`` up to torchao 0.15).

Source: ``Int4WeightOnlyConfig`` of ``torchao/quantization/quant_api.py``, read in torchao 0.14.1,
0.16, 0.17 and 0.18.
"""

import functools
import importlib

import torch

from benchmarks.peers import torch_lora
from benchmarks.peers.peer import Peer, not_importable

PACKINGS = ("tile_packed_to_4d", "plain", "preshuffled")
GROUP_SIZES = (32, 64, 128, 256)


def _refuses(layer):
    if layer.device.type != "cuda":
        return "these packings are for CUDA"
    if layer.dtype != torch.bfloat16:
        return f"x in {layer.dtype}: torchao takes bfloat16"
    if layer.group_size not in GROUP_SIZES:
        return f"groups of {layer.group_size}: torchao takes {GROUP_SIZES}"
    return not_importable("torchao.quantization")


def _make(packing, layer):
    weights = [_quantised(packing, layer) for _ in range(layer.copies)]
    return functools.partial(_call, layer.x), weights


def _quantised(packing, layer):
    """Return an ``nn.Linear`` with a quantised weight, without changing Inductor's options."""
    quantization = importlib.import_module("torchao.quantization")
    config = quantization.Int4WeightOnlyConfig(
        group_size=layer.group_size, int4_packing_format=packing, set_inductor_config=False
    )
    module = torch.nn.Linear(layer.columns, layer.rows, bias=False, device="meta")
    module.weight = torch.nn.Parameter(layer.dense.clone(), requires_grad=False)
    quantization.quantize_(module, config)
    return module


def _call(x, module):
    return module(x)


PEERS = tuple(
    Peer(f"torchao {packing}", _refuses, functools.partial(_make, packing), torch_lora.ADAPTERS)
    for packing in PACKINGS
)
