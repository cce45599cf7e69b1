"""A packed weight some rows at a time, so that what is held does not grow with it.

Source: ``docs/format.md`` for which tensors are packed along which dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.safetensors_files import read_rows, read_tensor
from int4_lora.reference import PackedWeight

__all__ = ["check_packed", "row_blocks", "rows_of"]

WEIGHTS = 2**20  # of a block


def row_blocks(
    checkpoint: Checkpoint, name: str, *, whole: bool = False
) -> Iterator[tuple[int, PackedWeight]]:
    """Yield blocks of rows of a packed weight, each as a weight of its own.

    Args:
        checkpoint: an open checkpoint whose headers were checked.
        name: one of its packed modules.
        whole: all rows at once.

    Yields:
        The first row of a block, and the block.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: tensors that contradict each other, or a file that changed.
    """
    rows, columns = checkpoint.shape_of(name)
    step = _step(checkpoint, name)
    count = rows if whole else max(step, WEIGHTS // columns // step * step)
    for start in range(0, rows, count):
        yield start, _rows(checkpoint, name, start, min(start + count, rows), columns)


def check_packed(checkpoint: Checkpoint, name: str) -> None:
    """Check a packed module by its headers, and the values that have rules by its first rows.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: tensors that contradict each other, or a ``weight_g_idx`` out of range.
    """
    checkpoint.check(name)
    if f"{name}.weight_g_idx" in checkpoint.tensors:
        next(row_blocks(checkpoint, name))


def rows_of(checkpoint: Checkpoint, name: str) -> dict[str, int]:
    """Return how many rows of a packed weight share a row of each of its tensors.

    Args:
        checkpoint: an open checkpoint.
        name: one of its packed modules.
    """
    scheme = checkpoint.schemes[name]
    blocks = scheme.group_size[0] if isinstance(scheme.group_size, tuple) else 1
    packed_zeros = scheme.strategy in ("channel", "group")
    return {
        "weight_packed": 1,
        "weight_scale": blocks,
        "weight_zero_point": 32 // scheme.bits if packed_zeros else blocks,
    }


def _step(checkpoint: Checkpoint, name: str) -> int:
    """Return of what the first row of a block must be a multiple."""
    return math.lcm(*rows_of(checkpoint, name).values())


def _rows(checkpoint: Checkpoint, name: str, start: int, stop: int, columns: int) -> PackedWeight:
    """Return some rows of a packed weight."""
    scheme = checkpoint.schemes[name]
    shared = rows_of(checkpoint, name)

    def part(kind: str) -> Tensor | None:
        full = f"{name}.{kind}"
        if full not in checkpoint.tensors:
            return None
        stored = checkpoint.tensors[full]
        if kind not in shared or len(stored.shape) < 2:  # g_idx, and one scale for all
            return read_tensor(stored, full)
        each = shared[kind]
        return read_rows(stored, full, start // each, -(-stop // each))

    packed, scale = part("weight_packed"), part("weight_scale")
    assert packed is not None, "the headers were checked"
    assert scale is not None, "the headers were checked"
    try:
        return PackedWeight(
            packed=packed,
            scale=scale,
            shape=(stop - start, columns),
            zero_point=part("weight_zero_point"),
            g_idx=part("weight_g_idx"),
            group_size=scheme.group_size,
            bits=scheme.bits,
        )
    except (TypeError, ValueError) as error:
        file = checkpoint.tensors[f"{name}.weight_packed"].file
        raise type(error)(f"{file}: {name}: {error}") from error
