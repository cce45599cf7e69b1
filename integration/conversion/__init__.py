"""Make one checkpoint from another, tensor by tensor, whatever their size.

``unpack`` and ``merge`` plan a conversion as a list of ``tasks``; ``convert`` runs the plan:
``result_files`` lays the result out and writes it, ``result_folder`` keeps it apart until it is
whole.

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
    """Import a name of ``__all__`` when it is first asked for."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    globals()[name] = value
    return value
