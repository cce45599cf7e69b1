"""vLLM's CPU kernel for INT4 weights, with its CPU operators for adapters.

The layout of a weight is that of ``CPUWNA16LinearKernel``; adapters are added as in
``PunicaWrapperCPU``, with the scaling multiplied into B when an adapter is loaded.

Source: ``vllm/model_executor/kernels/linear/mixed_precision/cpu.py`` and
``vllm/lora/ops/torch_ops/lora_ops.py``, read in vLLM 0.32.0.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from int4_lora.reference import LoRASlice, LoRAStack, PackedWeight, pack, unpack
from int4_lora.reference.conformance import Manifest
from int4_lora.reference.linear import as_slices

__all__ = ["VllmCpu", "VllmCpuLora"]

CODES_OF_A_WORD = 8
WORDS_OF_A_BLOCK = 2  # sixteen outputs


class VllmCpuLora:
    """``bgmv_shrink`` and ``bgmv_expand_slice``; -1 means no adapter, as on other platforms."""

    manifest = Manifest(
        dtypes=(torch.float16, torch.bfloat16), devices=("cpu",), delta_rounded=True
    )

    def __init__(self) -> None:
        self._adapters = importlib.import_module("vllm.lora.ops.torch_ops")

    def shrink(self, x: Tensor, lora: LoRAStack, adapter_ids: Tensor) -> Tensor:
        """Return x A^T in float32."""
        h = torch.zeros(x.shape[0], lora.rank, dtype=torch.float32)
        self._adapters.bgmv_shrink(x, lora.a, h, adapter_ids, 1.0)
        return h

    def add(
        self, y: Tensor, x: Tensor, lora: LoRAStack | Sequence[LoRASlice], adapter_ids: Tensor
    ) -> Tensor:
        """Add the deltas to y, in place."""
        for part in as_slices(lora):
            stack = part.stack
            b = stack.b * stack.scaling.to(stack.b.dtype)[:, None, None]
            h = self.shrink(x, stack, adapter_ids)
            self._adapters.bgmv_expand_slice(
                h, b, y, adapter_ids, part.start, stack.out_features, add_inputs=True
            )
        return y


class VllmCpu(VllmCpuLora):
    """``cpu_gemm_wna16`` with the operators above."""

    manifest = Manifest(
        dtypes=(torch.bfloat16, torch.float16),
        scale_dtype_of_x=True,
        strategies=("group", "channel"),
        g_idx=False,
        in_multiple=32,
        out_multiple=32,
        devices=("cpu",),
        base_rounded=True,
        delta_rounded=True,
    )

    def __init__(self) -> None:
        super().__init__()
        self._ops = importlib.import_module("vllm._custom_ops")
        if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
            raise ImportError("this vLLM has no cpu_gemm_wna16: it is not built for CPUs")
        self._has_amx = torch.cpu._is_amx_tile_supported()

    def prepare(self, weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return words, scales ``[groups, out]`` and zero-points in the kernel's order."""
        codes = unpack(weight.packed, weight.in_features)
        words = pack(codes, dim=0).T.reshape(weight.in_features, -1, WORDS_OF_A_BLOCK)
        blocks = words.permute(1, 0, 2).reshape(-1, weight.in_features * WORDS_OF_A_BLOCK)
        zero_point = None if weight.zero_point is None else weight.zero_point.T.contiguous()
        return blocks.contiguous(), weight.scale.T.contiguous(), zero_point

    def int4_linear(
        self, x: Tensor, weight: tuple[Tensor, Tensor, Tensor | None], bias: Tensor | None = None
    ) -> Tensor:
        """Return the kernel's result."""
        words, scale, zero_point = weight
        isa = "amx" if self._has_amx and x.dtype == torch.bfloat16 else "vec"
        bias = None if bias is None else bias.to(x.dtype)
        y: Tensor = self._ops.cpu_gemm_wna16(
            x, words, scale, zero_point, bias, CODES_OF_A_WORD, isa
        )
        return y

    def int4_lora_linear(
        self,
        x: Tensor,
        weight: tuple[Tensor, Tensor, Tensor | None],
        lora: LoRAStack | Sequence[LoRASlice] | None = None,
        adapter_ids: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return the kernel's result with the adapters added to it."""
        y = self.int4_linear(x, weight, bias)
        return y if lora is None or adapter_ids is None else self.add(y, x, lora, adapter_ids)
