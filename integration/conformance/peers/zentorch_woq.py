"""zentorch's INT4 operator, called as vLLM's ``ZentorchWNA16LinearKernel`` calls it.

Source: ``vllm/model_executor/kernels/linear/mixed_precision/zentorch.py`` of vLLM 0.33.0: groups
that divide in_features, or one for a row; ``zentorch/_fp16_capabilities.py`` of zentorch 2.13.0.2:
no float16.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from int4_lora.integration.conformance.peers.unsigned import (
    unsigned_codes,
    unsigned_zero_points,
)
from int4_lora.reference import PackedWeight, unpack
from int4_lora.reference.conformance import Manifest

__all__ = ["ZentorchWoq"]


class ZentorchWoq:
    """``zentorch_woq_linear``."""

    manifest = Manifest(
        dtypes=(torch.bfloat16,),
        scale_dtype_of_x=True,
        strategies=("group", "channel"),
        g_idx=False,
        in_multiple=8,
        devices=("cpu",),
        weight_rounded=False,
    )

    def __init__(self) -> None:
        importlib.import_module("zentorch")
        if not torch.cpu._is_avx512_bf16_supported():  # it would return memory as it was allocated
            raise ImportError(
                "zentorch says: AVX512_BF16 ISA not supported by processor, "
                "cannot perform bf16bf16f32 gemm"
            )

    def prepare(self, weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return words, scales ``[groups, out]`` and zero-points ``[groups, out]``."""
        codes = unpack(weight.packed, weight.in_features)
        zero_point = None
        if not weight.symmetric:  # vLLM's uint4: codes and zero-points from 0 to 15
            codes = unsigned_codes(weight).to(torch.int8)
            zero_point = unsigned_zero_points(weight).to(torch.int8).t().contiguous()
        words = torch.ops.zentorch.zentorch_woq_repack_weight(codes.contiguous())
        return words.t(), weight.scale.t().contiguous(), zero_point

    def int4_linear(
        self, x: Tensor, weight: tuple[Tensor, Tensor, Tensor | None], bias: Tensor | None = None
    ) -> Tensor:
        """Return the operator's result."""
        bias = None if bias is None else bias.to(x.dtype)
        y: Tensor = torch.ops.zentorch.zentorch_woq_linear(x, *weight, bias)
        return y
