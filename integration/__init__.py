"""Checkpoints, adapters and the command line.

Source: compressed-tensors for checkpoints, PEFT for adapters.
"""

from int4_lora.integration.adapter import Adapter, AdapterModule, read_adapter, stack_adapters
from int4_lora.integration.checkpoint import Checkpoint, open_checkpoint

__all__ = [
    "Adapter",
    "AdapterModule",
    "Checkpoint",
    "open_checkpoint",
    "read_adapter",
    "stack_adapters",
]
