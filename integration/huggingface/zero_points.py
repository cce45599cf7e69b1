"""Make transformers expect zero-points as checkpoints store them: packed.

transformers lets compressed-tensors compress a model on the meta device, and takes the shapes from
it. From 0.18 on, compressed-tensors gives packed words their shape there and leaves zero-points
unpacked; from 5.23 on, transformers compares shapes, and refuses asymmetric checkpoints.

Source: ``PackedQuantizationCompressor.compress`` of compressed-tensors 0.17 to 0.20, and
``set_param_for_module`` of transformers.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["packed_zero_points"]

PACKED = ("group", "channel")  # the strategies whose zero-points are packed, along the outputs
_LOCK = threading.RLock()  # the method that is replaced is the whole process's


@contextlib.contextmanager
def packed_zero_points() -> Iterator[None]:
    """Give zero-points on the meta device their packed shape while the context lasts.

    Where compressed-tensors does that itself, or is not installed, nothing changes.

    Example:
        >>> with packed_zero_points():  # doctest: +SKIP
        ...     model = AutoModelForCausalLM.from_pretrained("my-asymmetric-model-W4A16")
    """
    try:
        from compressed_tensors.compressors import PackedQuantizationCompressor as compressor
    except ImportError:
        yield
        return
    with _LOCK:
        compress = compressor.__dict__["compress"]

        @functools.wraps(compress.__func__)
        def with_packed_zero_points(cls: Any, state_dict: Any, scheme: Any) -> Any:
            return _packed(compress.__func__(cls, state_dict, scheme), scheme.weights)

        compressor.compress = classmethod(with_packed_zero_points)
        try:
            yield
        finally:
            compressor.compress = compress


def _packed(compressed: dict[str, Any], weights: Any) -> dict[str, Any]:
    """Return a compressed module's tensors, of which a zero-point on meta is packed."""
    zero_point = compressed.get("weight_zero_point")
    if (
        zero_point is None
        or zero_point.device.type != "meta"
        or zero_point.dtype == torch.int32  # packed
        or weights.strategy not in PACKED
    ):
        return compressed
    words = math.ceil(len(zero_point) * weights.num_bits / 32)
    shape = (words, *zero_point.shape[1:])
    return {**compressed, "weight_zero_point": torch.empty(shape, dtype=torch.int32, device="meta")}
