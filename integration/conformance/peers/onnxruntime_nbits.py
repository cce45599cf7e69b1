"""ONNX Runtime's ``MatMulNBits`` on a CPU.

The operator computes (u - z) s with scales in the dtype of x, and adds a bias of that dtype.

Source: ``com.microsoft.MatMulNBits`` in ``docs/ContribOperators.md`` of ONNX Runtime 1.31: x in
float32 or float16, blocks of 16 or more columns that are a power of two, zero-points of 4 bits.
Its g_idx is called deprecated, and is not claimed.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.conformance.peers.unsigned import (
    group_size_of,
    nibbles,
    unsigned_codes,
    unsigned_zero_points,
)
from int4_lora.reference import PackedWeight
from int4_lora.reference.conformance import Manifest

__all__ = ["OnnxRuntimeNBits"]

OPSETS = (("", 21), ("com.microsoft", 1))
IR_VERSION = 10


class OnnxRuntimeNBits:
    """A session with one ``MatMulNBits``, with the default ``accuracy_level``."""

    manifest = Manifest(
        dtypes=(torch.float16, torch.float32),
        scale_dtype_of_x=True,
        groups=(16, 32, 64, 128, 256),
        strategies=("group",),
        g_idx=False,
        weight_rounded=False,
        base_rounded=True,
    )

    def __init__(self) -> None:
        self._onnx = importlib.import_module("onnx")
        self._runtime = importlib.import_module("onnxruntime")

    def prepare(self, weight: PackedWeight) -> Any:
        """Return a session whose inputs are x and a bias."""
        rows, columns = weight.shape
        group = group_size_of(weight)
        data = nibbles(unsigned_codes(weight)).reshape(rows, -1, group // 2)
        constants = {"weight": data.numpy(), "scale": weight.scale.numpy()}
        if not weight.symmetric:  # without zero-points the operator takes 8
            constants["zero_point"] = nibbles(unsigned_zero_points(weight)).numpy()
        helper, dtype = self._onnx.helper, self._element_type(weight.scale)
        inputs = ["x", "weight", "scale", "zero_point" if not weight.symmetric else "", "", "bias"]
        node = helper.make_node(
            "MatMulNBits", inputs, ["y"], domain="com.microsoft",
            K=columns, N=rows, bits=4, block_size=group,
        )  # fmt: skip
        graph = helper.make_graph(
            [node],
            "linear",
            [
                helper.make_tensor_value_info("x", dtype, ["tokens", columns]),
                helper.make_tensor_value_info("bias", dtype, [rows]),
            ],
            [helper.make_tensor_value_info("y", dtype, ["tokens", rows])],
            [self._onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opsets = [helper.make_opsetid(*opset) for opset in OPSETS]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = 1
        return self._runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def int4_linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Return the session's result."""
        rows = weight.get_inputs()[1].shape[0]
        bias = torch.zeros(rows, dtype=x.dtype) if bias is None else bias.to(x.dtype)
        feed = {"x": x.contiguous().numpy(), "bias": bias.contiguous().numpy()}
        return torch.from_numpy(weight.run(None, feed)[0])

    def _element_type(self, value: Tensor) -> int:
        types = self._onnx.TensorProto
        return int(types.FLOAT16 if value.dtype == torch.float16 else types.FLOAT)
