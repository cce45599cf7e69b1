"""Convert checkpoints tensor by tensor, so that their size does not matter.

``unpack`` and ``merge`` plan a conversion as a list of ``tasks``. ``convert`` runs the plan.
``result_files`` lays out and writes the result's files; ``result_folder`` keeps the result beside
its target until it is complete.

Source: ``docs/commands/unpack.md`` and ``docs/commands/merge.md``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from int4_lora.integration.conversion.merge import merge_checkpoint
    from int4_lora.integration.conversion.unpack import unpack_checkpoint

__all__ = ["merge_checkpoint", "unpack_checkpoint"]

MODULES = {"merge_checkpoint": "merge", "unpack_checkpoint": "unpack"}


def __getattr__(name: str) -> object:
    """Import a name of ``__all__`` on first access."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    globals()[name] = value
    return value
