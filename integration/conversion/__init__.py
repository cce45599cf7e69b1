"""Make one checkpoint from another, tensor by tensor, whatever their size.

``unpack`` and ``merge`` plan a conversion as a list of ``tasks``; ``convert`` runs the plan:
``result_files`` lays the result out and writes it, ``result_folder`` keeps it apart until it is
whole.

Source: ``docs/commands/unpack.md`` and ``docs/commands/merge.md``.
"""

from int4_lora.integration.conversion.merge import merge_checkpoint
from int4_lora.integration.conversion.unpack import unpack_checkpoint

__all__ = ["merge_checkpoint", "unpack_checkpoint"]
