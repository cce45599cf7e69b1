"""gemlite's Triton kernels: codes from 0 to 15 and a zero of 8 for all groups.

gemlite chooses among its kernels by the number of tokens. It measures launches in the first call of
each kernel, before the peer is timed.

Source: ``GemLiteLinear`` of ``gemlite/core.py``, read in gemlite 0.6.0.post2.
"""

import functools
import importlib

import torch

from benchmarks.peers import torch_lora
from benchmarks.peers.peer import Peer, not_importable
from int4_lora.reference import unpack

ZERO = 8
NAMES = {torch.float16: "FP16", torch.bfloat16: "BF16"}


def _refuses(layer):
    if layer.device.type != "cuda":
        return "gemlite is for CUDA"
    if layer.dtype not in NAMES:
        return f"x in {layer.dtype}: gemlite takes 16 bits"
    if layer.columns % 32 or layer.group_size % 32:
        return "in_features or groups that are no multiple of 32"
    return not_importable("gemlite")


def _make(layer):
    weights = [_packed(layer) for _ in range(layer.copies)]
    return functools.partial(_call, layer.x), weights


def _packed(layer):
    """Return gemlite's linear, which holds a weight."""
    gemlite = importlib.import_module("gemlite")
    dtype = getattr(gemlite.DType, NAMES[layer.dtype])
    module = gemlite.GemLiteLinear(
        4,
        group_size=layer.group_size,
        in_features=layer.columns,
        out_features=layer.rows,
        input_dtype=dtype,
        output_dtype=dtype,
    )
    codes = unpack(layer.weight.packed, layer.columns) + ZERO
    module.pack(codes.to(torch.uint8), layer.weight.scale.clone(), ZERO)
    return module


def _call(x, module):
    return module(x)


PEERS = (Peer("gemlite", _refuses, _make, torch_lora.ADAPTERS),)
