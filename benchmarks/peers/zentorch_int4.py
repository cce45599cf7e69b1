"""AMD's zentorch, prepared and called as vLLM's ``ZentorchWNA16LinearKernel`` does: W4A16.

The operator repacks codes of one byte into words, and takes scales of groups ``[groups, out]``. On
a processor without instructions for products of bfloat16 it prints so and returns numbers that it
did not compute (zentorch 2.13.0.2).

Source: ``vllm/model_executor/kernels/linear/mixed_precision/zentorch.py``; zentorch 2.13.0.2.
"""

import functools

import torch

from benchmarks.peers import torch_lora
from benchmarks.peers.peer import Peer, not_importable
from int4_lora.reference import unpack

OPERATORS = ("zentorch_woq_repack_weight", "zentorch_woq_linear")


def _refuses(layer):
    if layer.device.type != "cpu":
        return "zentorch is for a CPU"
    if layer.dtype != torch.bfloat16:
        return f"x in {layer.dtype}: the operator takes bfloat16"
    if not torch.cpu._is_avx512_bf16_supported():
        return "zentorch needs a CPU with AVX512_BF16"
    missing = not_importable("zentorch")
    if missing is None and not all(hasattr(torch.ops.zentorch, name) for name in OPERATORS):
        return f"this zentorch lacks one of {', '.join(OPERATORS)}"
    return missing


def _make(layer):
    laid_out = [_laid_out(layer.weight) for _ in range(layer.copies)]
    return functools.partial(_product, layer.x), laid_out


def _laid_out(weight):
    """Return the words ``[in / 8, out]``, and the scales ``[groups, out]``."""
    codes = unpack(weight.packed, weight.in_features)
    words = torch.ops.zentorch.zentorch_woq_repack_weight(codes)
    return words.t(), weight.scale.t().contiguous()


def _product(x, weight):
    words, scale = weight
    return torch.ops.zentorch.zentorch_woq_linear(x, words, scale, None, None)


PEERS = (Peer("zentorch", _refuses, _make, torch_lora.ADAPTERS),)
