"""Read a packed weight in blocks of rows, so that memory does not grow with the weight.

``PackedWeight.rows`` slices a weight in memory; this module reads rows from a file. A block starts
where every tensor of the module starts a row. The tensors of GPTQ and AWQ, whose columns are the
outputs, are read as a whole: their codes are half a byte or a byte for each weight.

Source: ``docs/format.md`` for the dimension along which each tensor is packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from int4_lora.integration.checkpoint.assembly import assemble, columns
from int4_lora.integration.checkpoint.layouts import INT_QUANTIZED
from int4_lora.integration.checkpoint.open import Checkpoint
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
    rows, width = checkpoint.shape_of(name)
    step = math.lcm(*rows_of(checkpoint, name).values())
    count = rows if whole else max(step, WEIGHTS // width // step * step)
    starts = range(0, rows, count)
    if checkpoint.layout(name).rows:
        for start in starts:
            yield start, _block(checkpoint, name, start, min(start + count, rows), width)
        return
    stored = {full.rpartition(".")[2]: checkpoint.tensor(full) for full in checkpoint.stored(name)}
    for start in starts:
        part = columns(checkpoint.schemes[name], stored, start, min(start + count, rows))
        yield start, _assembled(checkpoint, name, part, None)


def check_packed(checkpoint: Checkpoint, name: str) -> None:
    """Check a packed module by its headers, and by the values that may be wrong, such as g_idx.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: tensors contradict each other, or a value is out of range.
    """
    if any(f"{name}.{part}" in checkpoint.tensors for part in checkpoint.layout(name).checked):
        checkpoint.check_values(name)
    else:
        checkpoint.check(name)


def rows_of(checkpoint: Checkpoint, name: str) -> dict[str, int]:
    """Return, for each tensor with rows, how many rows of the weight share one of its rows.

    Args:
        checkpoint: an open checkpoint.
        name: the name of a packed module.
    """
    scheme = checkpoint.schemes[name]
    block = scheme.group_size[0] if isinstance(scheme.group_size, tuple) else 1
    layout = checkpoint.layout(name)
    packed_zeros = layout is not INT_QUANTIZED and scheme.strategy in ("channel", "group")
    return {
        layout.codes: 1,
        "weight_scale": block,
        "weight_zero_point": 32 // scheme.bits if packed_zeros else block,
    }


def _block(checkpoint: Checkpoint, name: str, start: int, stop: int, width: int) -> PackedWeight:
    """Return the rows ``[start, stop)`` of a packed weight."""
    shared = rows_of(checkpoint, name)
    tensors = {}
    for kind in checkpoint.layout(name).parts:
        full = f"{name}.{kind}"
        if kind == "weight_shape" or full not in checkpoint.tensors:
            continue
        stored = checkpoint.tensors[full]
        if kind not in shared or len(stored.shape) < 2:  # g_idx, or one scale for the whole weight
            tensors[kind] = read_tensor(stored, full)
        else:
            first, last = start // shared[kind], -(-stop // shared[kind])
            tensors[kind] = read_rows(stored, full, first, last)
    return _assembled(checkpoint, name, tensors, (stop - start, width))


def _assembled(
    checkpoint: Checkpoint,
    name: str,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int] | None,
) -> PackedWeight:
    try:
        return assemble(checkpoint.schemes[name], tensors, shape)
    except (TypeError, ValueError) as error:
        file = checkpoint.tensors[checkpoint.stored(name)[0]].file
        raise type(error)(f"{file}: {name}: {error}") from error
