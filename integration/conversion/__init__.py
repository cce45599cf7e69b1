"""Convert checkpoints tensor by tensor, so that their size does not matter.

``unpack``, ``merge`` and ``repack`` plan a conversion as a list of ``tasks``. ``convert`` runs the
plan. ``result_files`` lays out and writes the result's files; ``result_folder`` keeps the result
beside its target until it is complete.

Source: ``docs/commands/unpack.md``, ``docs/commands/merge.md`` and ``docs/commands/convert.md``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from int4_lora.integration.conversion.merge import merge_checkpoint
    from int4_lora.integration.conversion.repack import convert_checkpoint
    from int4_lora.integration.conversion.unpack import unpack_checkpoint

__all__ = ["convert_checkpoint", "merge_checkpoint", "unpack_checkpoint"]

MODULES = {
    "convert_checkpoint": "repack",
    "merge_checkpoint": "merge",
    "unpack_checkpoint": "unpack",
}


def __getattr__(name: str) -> object:
    """Import a name of ``__all__`` on first access."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    globals()[name] = value
    return value
