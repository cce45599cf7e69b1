"""Leave out the tensors that an adapter saves along and that equal those of the base.

PEFT saves the embeddings and the head with an adapter that targets one of them
(``save_embedding_layers``), although it does not train them. A saved tensor equals the base's if it
is, bit for bit, the base's values in the saved tensor's dtype: a model that is loaded in another
dtype is saved in it.

Source: ``get_peft_model_state_dict`` in ``peft/utils/save_and_load.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from int4_lora.integration.adapter.adapter import Adapter
from int4_lora.integration.adapter.base_weights import BaseWeights
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.safetensors_files import read_rows, read_tensor
from int4_lora.integration.conversion.byte_tables import dense_rows
from int4_lora.integration.conversion.float4_modules import float4_blocks
from int4_lora.integration.conversion.row_blocks import row_blocks
from int4_lora.reference import dequantize

__all__ = ["without_copies"]

ROWS_BYTES = 8 * 2**20  # of a block of rows that is compared at a time
BITS_AS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def without_copies(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """Return an adapter without the tensors that equal those of the base.

    Args:
        adapter: an adapter, under the names of the base.
        checkpoint: the base.

    Returns:
        The adapter; its ``notes`` name the tensors that were left out.
    """
    base = BaseWeights(checkpoint)
    equal = [
        name
        for name, replacement in adapter.replacements.items()
        if replacement.rows is None and _equals(base, name, replacement.tensor)
    ]
    if not equal:
        return adapter
    return dataclasses.replace(
        adapter,
        replacements={name: one for name, one in adapter.replacements.items() if name not in equal},
        notes=(
            *adapter.notes,
            *(f"{name} is saved along and equals the base's: it is ignored" for name in equal),
        ),
    )


def _equals(base: BaseWeights, name: str, saved: Tensor) -> bool:
    """Return whether a saved tensor holds the values of the base in the saved tensor's dtype."""
    stored = base.checkpoint.tensors.get(name)
    if stored is not None and len(stored.shape) != 2:
        whole = read_tensor(stored, name)
        return whole.shape == saved.shape and _same_bits(whole.to(saved.dtype), saved)
    module = base.stored_name(base.name_in_base(name.removesuffix(".weight")))
    if not name.endswith(".weight") or not base.has_matrix(module):
        return False
    try:
        shape = base.matrix_shape(module, name)
    except ValueError:
        return False
    if shape != tuple(saved.shape):
        return False
    return all(
        _same_bits(rows.to(saved.dtype), saved[start : start + len(rows)])
        for start, rows in _blocks(base, module)
    )


def _blocks(base: BaseWeights, module: str) -> Iterator[tuple[int, Tensor]]:
    """Yield the dense weight of a module in blocks of rows."""
    if module in base.checkpoint.schemes and base.checkpoint.is_float4(module):
        for start, weight in float4_blocks(base.checkpoint, module):
            yield start, dequantize(weight)
        return
    if module in base.checkpoint.schemes:
        for start, block in row_blocks(base.checkpoint, module):
            yield start, dense_rows(block)
        return
    full = f"{module}.weight"
    stored = base.checkpoint.tensors[full]
    step = max(1, ROWS_BYTES // max(1, stored.nbytes // max(1, stored.shape[0])))
    for start in range(0, stored.shape[0], step):
        yield start, read_rows(stored, full, start, min(start + step, stored.shape[0]))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    integer = BITS_AS[one.element_size()]
    return torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))
