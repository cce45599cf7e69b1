"""Checkpoints, adapters and the command line.

Source: compressed-tensors for checkpoints, PEFT for adapters.
"""

from int4_lora.integration.adapter import Adapter, AdapterModule, read_adapter
from int4_lora.integration.adapter_stack import stack_adapters
from int4_lora.integration.adapter_writing import write_adapter
from int4_lora.integration.annotation import Annotation, annotate
from int4_lora.integration.checkpoint import Checkpoint, open_checkpoint
from int4_lora.integration.unpacked_weight_cache import UnpackedWeightCache
from int4_lora.integration.unpacking import unpack_int4_weights

__all__ = [
    "Adapter",
    "AdapterModule",
    "Annotation",
    "Checkpoint",
    "UnpackedWeightCache",
    "annotate",
    "open_checkpoint",
    "read_adapter",
    "stack_adapters",
    "unpack_int4_weights",
    "write_adapter",
]
