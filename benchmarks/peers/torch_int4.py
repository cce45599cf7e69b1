"""torch's INT4 operators: ``_weight_int4pack_mm`` on CUDA, ``..._for_cpu`` on a CPU.

On CUDA, w = RN((q - 8) * s + z) in bfloat16, with 4-bit unsigned q and a table of s and z, where z
is 0. Two columns share a byte, the first in the high bits.

Source: ``aten/src/ATen/native/cuda/int4mm.cu`` of PyTorch, and ``_group_quantize_tensor`` of
``torch/testing/_internal/common_quantization.py``.
"""

import functools

import torch

from benchmarks.peers import torch_lora
from benchmarks.peers.peer import Peer
from int4_lora.compiled import layouts
from int4_lora.compiled.formulations import int4pack
from int4_lora.reference import unpack

INNER_TILES = 8  # 16-column tiles side by side, so that loads have 16 bytes
GROUP_SIZES = (32, 64, 128, 256)


def _refuses(layer):
    if layer.device.type == "cpu":
        possible = "int4pack" in layouts(layer.weight)
        return None if possible else "a weight that the CPU's operator cannot hold"
    if layer.dtype != torch.bfloat16:
        return f"x in {layer.dtype}: the operator takes bfloat16"
    if layer.group_size not in GROUP_SIZES:
        return f"groups of {layer.group_size}: the operator takes {GROUP_SIZES}"
    if layer.rows % 8 or layer.columns % (16 * INNER_TILES):
        return "a shape that is no multiple of 8 x 128"
    return None


def _make(layer):
    if layer.device.type == "cpu":
        return functools.partial(int4pack.base, layer.x), layer.in_layout("int4pack")
    laid_out = [_laid_out(layer.weight) for _ in range(layer.copies)]
    return functools.partial(_product, layer.x, layer.group_size), laid_out


def _laid_out(weight):
    """Return the words and the table of scales and zeros ``[groups, out_features, 2]``."""
    codes = unpack(weight.packed, weight.in_features).to(torch.int32) + 8
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    scale = weight.scale.T
    table = torch.stack([scale, torch.zeros_like(scale)], dim=2).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES), table


def _product(x, group_size, weight):
    words, table = weight
    return torch.ops.aten._weight_int4pack_mm(x, words, group_size, table)


PEERS = (Peer("aten int4pack", _refuses, _make, torch_lora.ADAPTERS),)
