"""One checkpoint made of another, tensor by tensor, whatever their size.

Source: ``docs/commands/unpack.md`` and ``docs/commands/merge.md``.
"""

from int4_lora.integration.conversion.merge import merge_checkpoint
from int4_lora.integration.conversion.unpack import unpack_checkpoint

__all__ = ["merge_checkpoint", "unpack_checkpoint"]
