"""gemlite's Triton kernels, in Triton's interpreter where there is no GPU.

Without a GPU they are told of an H100 and its settings, none is tuned, and Triton must not have
been imported before. Each number of tokens gets the kernel that gemlite chooses for it. The
interpreter has no atomic addition of bfloat16, so there only float16 is claimed.

Source: "Usage" in the README of gemlite 0.6: float16 and bfloat16, groups that are multiples of 32.
``A16W4_HQQ_INT`` of ``gemlite/helper.py``: zero-points in the dtype of the scales.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from int4_lora.integration.conformance.peers.unsigned import unsigned_codes, unsigned_zero_points
from int4_lora.reference import PackedWeight
from int4_lora.reference.conformance import Manifest

__all__ = ["GemliteTriton"]

CAPABILITY, WARP = 90, 32
PROPERTIES = {"max_shared_mem": 232448, "multiprocessor_count": 132}
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=WARP,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    regs_per_multiprocessor=65536, total_memory=2**36,
)  # fmt: skip


class GemliteTriton:
    """A linear of ``A16W4_HQQ_INT``."""

    manifest = Manifest(
        dtypes=(torch.float16, torch.bfloat16),
        scale_dtype_of_x=True,
        groups=(32, 64, 128, 256),
        strategies=("group",),
        g_idx=False,
        finite_scales=True,
        in_multiple=32,
        deterministic=False,
        weight_rounded=False,
        base_rounded=True,
    )

    def __init__(self) -> None:
        if torch.cuda.is_available():
            self._helper = importlib.import_module("gemlite.helper")
        else:
            self._helper = _in_interpreter()
            self.manifest = replace(self.manifest, dtypes=(torch.float16,))

    def prepare(self, weight: PackedWeight) -> Any:
        """Return gemlite's linear."""
        dtype = weight.scale.dtype
        processor = self._helper.A16W4_HQQ_INT(device=weight.packed.device.type, dtype=dtype)
        return processor.from_weights(
            unsigned_codes(weight).to(torch.uint8),
            weight.scale,
            unsigned_zero_points(weight).to(dtype),
        )

    def int4_linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Return the linear's result."""
        with _gpu_is_named():
            y: Tensor = weight(x)
        return y if bias is None else (y + bias).to(x.dtype)


def _gpu_is_named() -> Any:
    if torch.cuda.is_available():
        return mock.patch.dict({})
    return mock.patch.multiple(
        torch.cuda,
        get_device_properties=lambda *_: H100,
        get_device_capability=lambda *_: (H100.major, H100.minor),
        get_device_name=lambda *_: H100.name,
        current_device=lambda: 0,
        is_current_stream_capturing=lambda: False,
    )


def _in_interpreter() -> Any:
    """Import gemlite with Triton's interpreter, and with what it asks of a GPU."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise ImportError("Triton was imported before its interpreter was chosen")
    os.environ["TRITON_INTERPRET"] = "1"
    triton: Any = importlib.import_module("triton")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", CAPABILITY, WARP)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_benchmarker=lambda: lambda *_, **__: [0.0, 0.0, 0.0],  # all settings are as fast
        utils=SimpleNamespace(get_device_properties=lambda _: PROPERTIES),
    )
    triton.runtime.driver.set_active(driver)
    with _gpu_is_named():
        return importlib.import_module("gemlite.helper")
