"""vLLM's CUDA kernels for INT4 weights, each with vLLM's Punica operators for adapters.

They are called as vLLM's layers call them. This project has not run them: it had no machine with
CUDA.

Source: ``vllm/model_executor/kernels/linear/mixed_precision`` (``marlin.py``, ``machete.py``,
``triton_w4a16.py``), ``vllm/_custom_ops.py`` and ``vllm/lora/ops/triton_ops``, read in vLLM 0.32.0.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from int4_lora.reference import LoRASlice, LoRAStack, PackedWeight, pack, unpack
from int4_lora.reference.conformance import Manifest
from int4_lora.reference.linear import as_slices

__all__ = ["Machete", "Marlin", "TritonW4A16"]

Product = Callable[[Tensor], Tensor]
MARLIN = "vllm.model_executor.layers.quantization.utils.marlin_utils"
TRITON = "vllm.model_executor.kernels.linear.mixed_precision.triton_w4a16"
BLOCKS_OF_A_MULTIPROCESSOR = 4  # the most for which Marlin keeps locks


def claims(*, groups: tuple[int, ...], out_multiple: int, in_multiple: int) -> Manifest:
    """Return the claims of one kernel: all but these arguments are common to the kernels."""
    return Manifest(
        dtypes=(torch.float16, torch.bfloat16),
        scale_dtype_of_x=True,
        groups=groups,
        strategies=("group",),
        symmetric=True,
        g_idx=False,
        out_multiple=out_multiple,
        in_multiple=in_multiple,
        bias=False,
        devices=("cuda",),
        base_rounded=True,
        delta_rounded=True,
    )


class WithPunica:
    """A base kernel with Punica's operators: shrink into float32, expand into the base."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ImportError("there is no CUDA device")
        self.ops = importlib.import_module("vllm._custom_ops")
        self.punica = importlib.import_module("vllm.lora.ops.triton_ops")

    def int4_linear(self, x: Tensor, weight: Product) -> Tensor:
        """Return the kernel's result."""
        return weight(x)

    def int4_lora_linear(
        self,
        x: Tensor,
        weight: Product,
        lora: LoRAStack | Sequence[LoRASlice] | None = None,
        adapter_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the kernel's result with the adapters added to it."""
        y = weight(x)
        if lora is None or adapter_ids is None or not len(x):
            return y
        slices = as_slices(lora)
        meta = self.punica.LoRAKernelMeta.make(slices[0].stack.adapters, len(x), x.device)
        meta.prepare_tensors(adapter_ids)
        tokens = meta.meta_args(len(x), False)
        for part in slices:
            stack = part.stack
            b = (stack.b * stack.scaling.to(stack.b.dtype)[:, None, None]).contiguous()
            h = torch.empty(1, len(x), stack.rank, dtype=torch.float32, device=x.device)
            self.punica.lora_shrink(x, [stack.a.contiguous()], h, *tokens, 1.0)
            self.punica.lora_expand(h, [b], y, *tokens, offset_start=part.start, add_inputs=True)
        return y


class Marlin(WithPunica):
    """``marlin_gemm``."""

    manifest = claims(groups=(32, 64, 128), out_multiple=64, in_multiple=128)

    def prepare(self, weight: PackedWeight) -> Product:
        """Convert a weight to the layout of ``MarlinLinearKernel``."""
        marlin = importlib.import_module(MARLIN)
        kind = importlib.import_module("vllm.scalar_type").scalar_types.uint4b8
        rows, columns = weight.shape
        words = self.ops.gptq_marlin_repack(
            weight.packed.T.contiguous(), size_k=columns, size_n=rows, num_bits=4
        )
        scale = marlin.marlin_permute_scales(
            weight.scale.T.contiguous(),
            size_k=columns,
            size_n=rows,
            group_size=columns // weight.scale.shape[1],
        )
        device = weight.packed.device
        workspace = marlin.marlin_make_workspace_new(device, BLOCKS_OF_A_MULTIPROCESSOR)
        empty = torch.empty(0, dtype=torch.int32, device=device)

        def product(x: Tensor) -> Tensor:
            y: Tensor = self.ops.marlin_gemm(
                x, None, words, None, scale, None, None, empty, workspace, kind,
                size_m=len(x), size_n=rows, size_k=columns,
                use_atomic_add=False, use_fp32_reduce=True, is_zp_float=False,
            )  # fmt: skip
            return y

        return product


class Machete(WithPunica):
    """``machete_mm``, on compute capability 9.0."""

    manifest = claims(groups=(64, 128), out_multiple=128, in_multiple=64)

    def prepare(self, weight: PackedWeight) -> Product:
        """Convert a weight to the layout of ``MacheteLinearKernel``."""
        if torch.cuda.get_device_capability(weight.packed.device) != (9, 0):
            raise RuntimeError("Machete is for compute capability 9.0")
        kind = importlib.import_module("vllm.scalar_type").scalar_types.uint4b8
        dtype = weight.scale.dtype
        words = self.ops.machete_prepack_B(
            weight.packed.t(), a_type=dtype, b_type=kind, group_scales_type=dtype
        )
        scale, group = weight.scale.T.contiguous(), weight.in_features // weight.scale.shape[1]

        def product(x: Tensor) -> Tensor:
            y: Tensor = self.ops.machete_mm(
                a=x, b_q=words, b_type=kind, b_group_scales=scale, b_group_size=group
            )
            return y

        return product


class TritonW4A16(WithPunica):
    """``triton_w4a16_gemm``."""

    manifest = claims(groups=(32, 64, 128), out_multiple=8, in_multiple=32)

    def prepare(self, weight: PackedWeight) -> Product:
        """Convert a weight to the layout of ``TritonW4A16LinearKernel``."""
        gemm = importlib.import_module(TRITON).triton_w4a16_gemm
        codes = unpack(weight.packed, weight.in_features)
        words = pack(codes.T.contiguous())  # [in, out / 8]
        scale, group = weight.scale.T.contiguous(), weight.in_features // weight.scale.shape[1]

        def product(x: Tensor) -> Tensor:
            y: Tensor = gemm(x.contiguous(), words, scale, None, group)
            return y

        return product
