"""Checkpoints, adapters and the command line.

Source: compressed-tensors for checkpoints, PEFT for adapters.
"""

from int4_lora.integration.adapter.read import Adapter, AdapterModule, read_adapter
from int4_lora.integration.adapter.stack import stack_adapters
from int4_lora.integration.adapter.write import write_adapter
from int4_lora.integration.annotation.write import Annotation, annotate
from int4_lora.integration.checkpoint.cache import UnpackedWeightCache
from int4_lora.integration.checkpoint.open import Checkpoint, open_checkpoint
from int4_lora.integration.checkpoint.unpack import unpack_int4_weights

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
