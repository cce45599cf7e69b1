"""Whether vLLM's kernel quantises activations, and how to make it not.

On CPUs with AMX, and with zentorch, vLLM's kernel for INT4 weights quantises activations to int8
(W4A8) unless ``VLLM_CPU_INT4_W4A8=0``. Its answers are then those of another model. ``auto``
measures vLLM's kernel with 16-bit activations (W4A16) and runs it so, unless the operator has set
the variable.

Source: vLLM's ``CPUWNA16LinearKernel`` and ``ZentorchWNA16LinearKernel``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm import envs

__all__ = [
    "VARIABLE",
    "of_the_operator",
    "quantises_activations",
    "sixteen_bit_activations",
    "would_quantise_activations",
]

VARIABLE = "VLLM_CPU_INT4_W4A8"
MARKS = ("use_w4a8", "_zentorch_da8w4")  # that vLLM's kernels leave on a layer


def of_the_operator() -> bool:
    """Return whether the operator has decided, by setting the variable."""
    return VARIABLE in os.environ


def quantises_activations(layer: Any) -> bool:
    """Return whether vLLM's kernel quantises the activations of a layer that it has laid out."""
    return any(bool(getattr(layer, mark, False)) for mark in MARKS)


def would_quantise_activations(kernel: Any, dtype: torch.dtype) -> bool:
    """Return whether vLLM's kernel quantises activations here, as it is set up.

    Args:
        kernel: of a layer's scheme.
        dtype: of the activations.
    """
    if not envs.VLLM_CPU_INT4_W4A8 or dtype != torch.bfloat16:
        return False
    names = {cls.__name__ for cls in type(kernel).__mro__}
    has_amx = bool(torch.cpu._is_amx_tile_supported())
    return "ZentorchWNA16LinearKernel" in names or ("CPUWNA16LinearKernel" in names and has_amx)


@contextmanager
def sixteen_bit_activations() -> Iterator[None]:
    """Let vLLM's kernels lay layers out for 16-bit activations.

    ``vllm.envs`` reads the environment where it has no attribute of the name.
    """
    before = vars(envs).get(VARIABLE)
    setattr(envs, VARIABLE, False)
    try:
        yield
    finally:
        if before is None:
            delattr(envs, VARIABLE)
        else:
            setattr(envs, VARIABLE, before)
