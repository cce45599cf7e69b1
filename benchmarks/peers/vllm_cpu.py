"""vLLM's CPU kernel, prepared and called as ``CPUWNA16LinearKernel`` does: symmetric INT4.

A word holds eight consecutive outputs of one column. The words of sixteen outputs are adjacent,
column after column. Until vLLM 0.29 the operator also takes a ``g_idx``.

Source: ``vllm/model_executor/kernels/linear/mixed_precision/cpu.py`` and ``vllm/_custom_ops.py``,
read in vLLM 0.17.1, 0.20.2, 0.27.1 and 0.32.0.
"""

import functools
import importlib
import inspect

import torch

from benchmarks.peers import torch_lora
from benchmarks.peers.peer import Peer, not_importable
from int4_lora.reference import pack, unpack

OPS = "vllm._custom_ops"
CODES_OF_A_WORD = 8
WORDS_OF_A_BLOCK = 2  # sixteen outputs


def _refuses(layer):
    if layer.device.type != "cpu":
        return "this kernel is for a CPU"
    if layer.dtype not in (torch.float16, torch.bfloat16):
        return f"x in {layer.dtype}: the kernel takes 16 bits"
    if layer.rows % 32 or layer.columns % 32:
        return "a shape that is no multiple of 32 x 32"
    missing = not_importable(OPS)
    if missing is None and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return "this vLLM has no cpu_gemm_wna16"
    return missing


def _make(layer):
    ops = importlib.import_module(OPS)
    takes_g_idx = "g_idx" in inspect.signature(ops.cpu_gemm_wna16).parameters
    no_g_idx = (None,) if takes_g_idx else ()
    matrix_unit = torch.cpu._is_amx_tile_supported() and layer.dtype == torch.bfloat16
    isa = "amx" if matrix_unit else "vec"
    laid_out = [_laid_out(layer.weight) for _ in range(layer.copies)]
    return functools.partial(_product, ops, layer.x, no_g_idx, isa), laid_out


def _laid_out(weight):
    """Return the words, and the scales ``[groups, out_features]``."""
    codes = unpack(weight.packed, weight.in_features)
    words = pack(codes, dim=0).T.reshape(weight.in_features, -1, WORDS_OF_A_BLOCK)
    blocks = words.permute(1, 0, 2).reshape(-1, weight.in_features * WORDS_OF_A_BLOCK)
    return blocks.contiguous(), weight.scale.T.contiguous()


def _product(ops, x, no_g_idx, isa, weight):
    words, scale = weight
    return ops.cpu_gemm_wna16(x, words, scale, None, *no_g_idx, None, CODES_OF_A_WORD, isa)


PEERS = (Peer("vLLM CPU", _refuses, _make, torch_lora.ADAPTERS),)
