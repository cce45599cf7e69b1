"""vLLM's Machete kernel, prepared and called as ``MacheteLinearKernel`` does: symmetric INT4.

Source: ``vllm/model_executor/kernels/linear/mixed_precision/machete.py`` and
``vllm/_custom_ops.py``, read in vLLM 0.17.1, 0.20.2, 0.27.1 and 0.32.0.
"""

import functools
import importlib

import torch

from benchmarks.peers import vllm_punica
from benchmarks.peers.peer import Peer, not_importable

OPS = "vllm._custom_ops"
SCALARS = "vllm.scalar_type"
GROUP_SIZES = (64, 128)


def _refuses(layer):
    if layer.device.type != "cuda":
        return "Machete is for CUDA"
    if torch.cuda.get_device_capability(layer.device) != (9, 0):
        return "Machete is for compute capability 9.0"
    if layer.dtype not in (torch.float16, torch.bfloat16):
        return f"x in {layer.dtype}: Machete takes 16 bits"
    if layer.group_size not in GROUP_SIZES:
        return f"groups of {layer.group_size}: Machete takes {GROUP_SIZES}"
    if layer.rows % 128 or layer.columns % 64:
        return "a shape that is no multiple of 128 x 64"
    return not_importable(OPS, SCALARS)


def _make(layer):
    ops = importlib.import_module(OPS)
    uint4b8 = importlib.import_module(SCALARS).scalar_types.uint4b8
    laid_out = [_laid_out(ops, uint4b8, layer) for _ in range(layer.copies)]
    return functools.partial(_product, ops, uint4b8, layer.x, layer.group_size), laid_out


def _laid_out(ops, uint4b8, layer):
    """Return the words, and the scales ``[groups, out_features]``."""
    words = ops.machete_prepack_B(
        layer.weight.packed.t(),  # [in / 8, out], its columns contiguous
        a_type=layer.dtype,
        b_type=uint4b8,
        group_scales_type=layer.dtype,
    )
    return words, layer.weight.scale.T.contiguous()


def _product(ops, uint4b8, x, group_size, weight):
    words, scale = weight
    return ops.machete_mm(
        a=x, b_q=words, b_type=uint4b8, b_group_scales=scale, b_group_size=group_size
    )


PEERS = (Peer("vLLM Machete", _refuses, _make, vllm_punica.ADAPTERS),)
