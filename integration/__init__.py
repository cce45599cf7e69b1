"""Checkpoints, adapters and the command line.

Names are imported when they are first asked for, so that ``int4-lora --help`` does not wait for
torch.

Source: compressed-tensors for checkpoints, PEFT for adapters.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from int4_lora.integration.adapter.adapter import Adapter, AdapterModule
    from int4_lora.integration.adapter.fitting import fit_adapter
    from int4_lora.integration.adapter.read import read_adapter
    from int4_lora.integration.adapter.stack import check_fits, stack_adapters
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
    "check_fits",
    "fit_adapter",
    "open_checkpoint",
    "read_adapter",
    "stack_adapters",
    "unpack_int4_weights",
    "write_adapter",
]

MODULES = {
    "Adapter": "adapter.adapter",
    "AdapterModule": "adapter.adapter",
    "Annotation": "annotation.write",
    "Checkpoint": "checkpoint.open",
    "UnpackedWeightCache": "checkpoint.cache",
    "annotate": "annotation.write",
    "check_fits": "adapter.stack",
    "fit_adapter": "adapter.fitting",
    "open_checkpoint": "checkpoint.open",
    "read_adapter": "adapter.read",
    "stack_adapters": "adapter.stack",
    "unpack_int4_weights": "checkpoint.unpack",
    "write_adapter": "adapter.write",
}


def __getattr__(name: str) -> object:
    """Import a name of ``__all__`` when it is first asked for."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the names that were not asked for yet, too."""
    return sorted({*globals(), *__all__})
