"""Read a packed weight in blocks of rows, so that memory does not grow with the weight.

``PackedWeight.rows`` slices a weight in memory; this module reads rows from a file. A block starts
where every tensor of the module starts a row.

Source: ``docs/format.md`` for the dimension along which each tensor is packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from int4_lora.integration.checkpoint.assembly import assemble
from int4_lora.integration.checkpoint.open import PARTS, Checkpoint
from int4_lora.integration.checkpoint.safetensors_files import read_rows, read_tensor
from int4_lora.reference import PackedWeight

__all__ = ["check_packed", "row_blocks", "rows_of"]

WEIGHTS = 2**20  # of a block; more only if the smallest aligned block has more


def row_blocks(
    checkpoint: Checkpoint, name: str, *, whole: bool = False
) -> Iterator[tuple[int, PackedWeight]]:
    """Yield blocks of rows of a packed weight, each as a ``PackedWeight``.

    Args:
        checkpoint: an open checkpoint.
        name: the name of a packed module, whose headers were checked.
        whole: whether to yield all rows at once.

    Yields:
        The index of a block's first row, and the block.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: tensors contradict each other, or a file changed.
    """
    rows, columns = checkpoint.shape_of(name)
    step = math.lcm(*rows_of(checkpoint, name).values())
    count = rows if whole else max(step, WEIGHTS // columns // step * step)
    for start in range(0, rows, count):
        yield start, _block(checkpoint, name, start, min(start + count, rows), columns)


def check_packed(checkpoint: Checkpoint, name: str) -> None:
    """Check a packed module by its headers, and g_idx by its values.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: tensors contradict each other, or ``weight_g_idx`` is out of range.
    """
    checkpoint.check(name)
    if f"{name}.weight_g_idx" in checkpoint.tensors:
        next(row_blocks(checkpoint, name))


def rows_of(checkpoint: Checkpoint, name: str) -> dict[str, int]:
    """Return, for each tensor with rows, how many rows of the weight share one of its rows.

    Args:
        checkpoint: an open checkpoint.
        name: the name of a packed module.
    """
    scheme = checkpoint.schemes[name]
    block = scheme.group_size[0] if isinstance(scheme.group_size, tuple) else 1
    packed_zeros = scheme.strategy in ("channel", "group")
    return {
        "weight_packed": 1,
        "weight_scale": block,
        "weight_zero_point": 32 // scheme.bits if packed_zeros else block,
    }


def _block(checkpoint: Checkpoint, name: str, start: int, stop: int, columns: int) -> PackedWeight:
    """Return the rows ``[start, stop)`` of a packed weight."""
    scheme = checkpoint.schemes[name]
    shared = rows_of(checkpoint, name)
    tensors = {}
    for kind in PARTS:
        full = f"{name}.{kind}"
        if kind == "weight_shape" or full not in checkpoint.tensors:
            continue
        stored = checkpoint.tensors[full]
        if kind not in shared or len(stored.shape) < 2:  # g_idx, or one scale for the whole weight
            tensors[kind] = read_tensor(stored, full)
        else:
            first, last = start // shared[kind], -(-stop // shared[kind])
            tensors[kind] = read_rows(stored, full, first, last)
    try:
        return assemble(scheme, tensors, (stop - start, columns))
    except (TypeError, ValueError) as error:
        file = checkpoint.tensors[f"{name}.weight_packed"].file
        raise type(error)(f"{file}: {name}: {error}") from error
