"""Products of slices of in_features with float32 sums, as an operator and its kernel on a GPU.

p[s, t, o] = sum over the columns k of slice s of x[s, t, k] * w[s, k, o]

The operator's meaning is a batch of plain products in float32. Inductor's own ``bmm`` would round
each partial sum to 16 bits. On a GPU, the lowering in this file gives the product to ``tl.dot`` and
keeps the sums in float32. What computes the factors is fused into the same kernel, so that a
decoded weight exists in registers only. The factors are rounded to 16 bits before the dot.

Only this file uses the internals of Inductor that make a dot of a reduction. It uses them in the
versions of torch that it was tried with; elsewhere ``unavailable`` says so.

Source: ``tuned_mm`` of ``torch/_inductor/kernel/mm.py`` under ``triton.native_matmul``.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["DOT_OPTIONS", "partial_products", "register_dot", "unavailable"]

DOT_OPTIONS = {
    "triton.native_matmul": True,  # kernels with tl.dot that Inductor generates itself
    "assert_indirect_indexing": False,  # an assertion does not compile beside a dot
}
TRIED = ((2, 13),)  # versions of torch
NAMESPACE = torch.library.Library(  # the operator lives as long as it
    "int4_lora", "FRAGMENT"
)  # type: ignore[no-untyped-call]
NAMESPACE.define("partial_products(Tensor x, Tensor w) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.impl(NAMESPACE, "partial_products", "CompositeExplicitAutograd")
def _product(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(x.to(torch.float32), w.to(torch.float32))


@torch.library.register_fake(  # type: ignore[untyped-decorator]
    "int4_lora::partial_products", lib=NAMESPACE
)
def _shape(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], w.shape[2], dtype=torch.float32)


def partial_products(x: Tensor, w: Tensor) -> Tensor:
    """Return ``x @ w`` of each slice, summed and returned in float32.

    Args:
        x: float16 or bfloat16 ``[slices, tokens, columns]``.
        w: ``[slices, columns, outputs]``, in the dtype of x.

    Returns:
        float32 ``[slices, tokens, outputs]``.

    Example:
        >>> x, w = torch.ones(2, 3, 4).bfloat16(), torch.ones(2, 4, 5).bfloat16()
        >>> p = partial_products(x, w)
        >>> p.shape, p.dtype, float(p[1, 2, 4])
        (torch.Size([2, 3, 5]), torch.float32, 4.0)
    """
    product: Tensor = torch.ops.int4_lora.partial_products(x, w)
    return product


@functools.cache
def unavailable() -> str | None:
    """Return why this torch cannot compile the operator to one kernel on a GPU, or None."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    return None if version in TRIED else f"torch {version[0]}.{version[1]}, not tried with tl.dot"


@functools.cache
def register_dot() -> None:
    """Teach Inductor to compile the operator on a GPU to a kernel with ``tl.dot``."""
    lowering: Any = importlib.import_module("torch._inductor.lowering")
    ir: Any = importlib.import_module("torch._inductor.ir")
    ops: Any = importlib.import_module("torch._inductor.virtualized").ops
    operator = torch.ops.int4_lora.partial_products.default
    on_a_cpu = lowering.fallback_handler(operator, add_to_fallback_set=False)
    unsqueeze = lowering.lowerings[torch.ops.aten.unsqueeze]

    def lower(x: Any, w: Any) -> Any:
        if x.get_device().type != "cuda":
            return on_a_cpu(x, w)
        dtype = x.get_dtype()
        factors, _ = lowering.transform_args(
            args=[unsqueeze(x, -1), unsqueeze(w, 1)],  # [slices, tokens, columns, outputs]
            kwargs={},
            broadcast=True,
            type_promotion_kind=None,
            convert_input_to_bool=False,
        )

        def narrow(value: Any) -> Any:
            return ops.to_dtype(value, dtype, use_compute_types=False)

        factors = [lowering.make_pointwise(narrow)(factor) for factor in factors]
        products = lowering.make_pointwise(ops.dot)(*factors)
        sums = lowering.make_reduction("dot", override_return_dtype=torch.float32)(products, 2)
        return ir.ExternKernel.require_contiguous(sums)  # else the order of x, and strided writes

    lowering.register_lowering(operator, type_promotion_kind=None)(lower)
