"""The operators for adapters on CPUs of a vLLM that is not installed, on the reference's base.

The folder in ``INT4_LORA_VLLM_BESIDE`` holds files of vLLM's wheel: its engine may not run on a
CPU, its operators need nothing but torch.

Source: ``vllm/lora/ops/torch_ops/lora_ops.py`` and ``vllm/lora/punica_wrapper/punica_cpu.py`` of
vLLM 0.33.0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from int4_lora.integration.conformance.peers.vllm_cpu import VllmCpuLora
from int4_lora.reference import LoRASlice, LoRAStack, PackedWeight, int4_linear
from int4_lora.reference.conformance import Manifest

__all__ = ["FOLDER", "VllmLoraOps"]

FOLDER = "INT4_LORA_VLLM_BESIDE"
FILE = Path("vllm", "lora", "ops", "torch_ops", "lora_ops.py")


class VllmLoraOps(VllmCpuLora):
    """``bgmv_shrink`` and ``bgmv_expand_slice`` on the base that the reference computes."""

    manifest = Manifest(
        dtypes=(torch.float16, torch.bfloat16),
        devices=("cpu",),
        base_rounded=True,
        delta_rounded=True,
    )

    def __init__(self) -> None:
        self._adapters = _operators()

    def int4_lora_linear(
        self,
        x: Tensor,
        weight: PackedWeight,
        lora: LoRAStack | Sequence[LoRASlice] | None = None,
        adapter_ids: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return the reference's base with the adapters added to it."""
        y = int4_linear(x, weight, bias)
        return y if lora is None or adapter_ids is None else self.add(y, x, lora, adapter_ids)


def _operators() -> ModuleType:
    folder = os.environ.get(FOLDER)
    if not folder:
        raise ImportError(f"{FOLDER} is not set to a folder with files of vLLM's wheel")
    path = Path(folder) / FILE
    spec = spec_from_file_location("vllm_beside_lora_ops", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"there is no {path}")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
