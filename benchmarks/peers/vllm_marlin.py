"""vLLM's Marlin kernel, prepared and called as ``MarlinLinearKernel`` does: symmetric INT4.

Until vLLM 0.29 its functions also take a ``g_idx`` and the order of the columns; both are passed as
empty tensors.

Source: ``vllm/model_executor/kernels/linear/mixed_precision/marlin.py`` and, in
``vllm/model_executor/layers/quantization/utils/marlin_utils.py``, ``apply_gptq_marlin_linear``;
``vllm/_custom_ops.py``; read in vLLM 0.17.1, 0.20.2, 0.27.1 and 0.32.0.
"""

import functools
import importlib
import inspect

import torch

from benchmarks.peers import vllm_punica
from benchmarks.peers.peer import Peer, not_importable

OPS = "vllm._custom_ops"
SCALARS = "vllm.scalar_type"
MARLIN = "vllm.model_executor.layers.quantization.utils.marlin_utils"
GROUP_SIZES = (32, 64, 128)
BLOCKS_OF_A_MULTIPROCESSOR = 4  # the most for which the kernel keeps locks


def _refuses(layer):
    if layer.device.type != "cuda":
        return "Marlin is for CUDA"
    if layer.dtype not in (torch.float16, torch.bfloat16):
        return f"x in {layer.dtype}: Marlin takes 16 bits"
    if layer.group_size not in GROUP_SIZES:
        return f"groups of {layer.group_size}: Marlin takes {GROUP_SIZES}"
    if layer.rows % 64 or layer.columns % 128:
        return "a shape that is no multiple of 64 x 128"
    return not_importable(OPS, SCALARS, MARLIN)


def _make(layer):
    ops, marlin = importlib.import_module(OPS), importlib.import_module(MARLIN)
    uint4b8 = importlib.import_module(SCALARS).scalar_types.uint4b8
    empty = torch.empty(0, dtype=torch.int32, device=layer.device)
    takes_order = "perm" in inspect.signature(ops.gptq_marlin_repack).parameters
    order = (empty, empty) if takes_order else ()
    workspace = marlin.marlin_make_workspace_new(layer.device, BLOCKS_OF_A_MULTIPROCESSOR)
    laid_out = [_laid_out(ops, marlin, order, layer) for _ in range(layer.copies)]
    after_scale = (None, None, empty, *order, workspace, uint4b8)  # x and W have no scales
    return functools.partial(_product, ops, layer.x, after_scale), laid_out


def _laid_out(ops, marlin, order, layer):
    """Return the words, and the scales in the order of the kernel's threads."""
    weight = layer.weight
    words = ops.gptq_marlin_repack(
        weight.packed.T.contiguous(),  # [in / 8, out]
        *order[:1],
        size_k=layer.columns,
        size_n=layer.rows,
        num_bits=4,
    )
    scale = marlin.marlin_permute_scales(
        weight.scale.T.contiguous(),  # [groups, out]
        size_k=layer.columns,
        size_n=layer.rows,
        group_size=layer.group_size,
    )
    return words, scale


def _product(ops, x, after_scale, weight):
    words, scale = weight
    return ops.marlin_gemm(
        x,
        None,  # y is a new tensor
        words,
        None,  # no bias
        scale,
        *after_scale,
        size_m=x.shape[0],
        size_n=scale.shape[1],
        size_k=x.shape[1],
        use_atomic_add=False,
        use_fp32_reduce=True,
        is_zp_float=False,
    )


PEERS = (Peer("vLLM Marlin", _refuses, _make, vllm_punica.ADAPTERS),)
