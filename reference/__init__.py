"""The ground truth: INT4 and FP4 weights and LoRA adapters, defined in eager PyTorch.

It imports torch and the standard library only, and accepts float64 operands. Start reading at
``linear.py``, whose docstring is the definition.

Source: ``docs/format.md`` for the bits, ``docs/numerics.md`` for the roundings.
"""

from int4_lora.reference.awq import AWQTensors, from_awq, to_awq
from int4_lora.reference.bounds import error_bound
from int4_lora.reference.dequantization import dequantize
from int4_lora.reference.experts import ExpertsLoRA, ExpertsWeight
from int4_lora.reference.float4_quantization import quantize_float4
from int4_lora.reference.float4_weight import Float4Weight
from int4_lora.reference.gptq import GPTQTensors, from_gptq, to_gptq
from int4_lora.reference.linear import int4_linear, int4_lora_linear
from int4_lora.reference.lora import expand, shrink
from int4_lora.reference.lora_stack import LoRASlice, LoRAStack, PackedLoRAStack
from int4_lora.reference.merging import MergeCost, merge, merge_quantized
from int4_lora.reference.moe import int4_moe
from int4_lora.reference.moe_bounds import moe_error_bound
from int4_lora.reference.packed_weight import PackedWeight
from int4_lora.reference.packing import pack, unpack
from int4_lora.reference.quantization import quantize

manifest = {"formats": ("int4", "nvfp4", "mxfp4")}
"""What the reference claims when it is a backend of its own conformance suite."""

__all__ = [
    "AWQTensors",
    "ExpertsLoRA",
    "ExpertsWeight",
    "Float4Weight",
    "GPTQTensors",
    "LoRASlice",
    "LoRAStack",
    "MergeCost",
    "PackedLoRAStack",
    "PackedWeight",
    "dequantize",
    "error_bound",
    "expand",
    "from_awq",
    "from_gptq",
    "int4_linear",
    "int4_lora_linear",
    "int4_moe",
    "merge",
    "merge_quantized",
    "moe_error_bound",
    "pack",
    "quantize",
    "quantize_float4",
    "shrink",
    "to_awq",
    "to_gptq",
    "unpack",
]
