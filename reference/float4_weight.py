"""One FP4 weight, as a checkpoint stores it: NVFP4 or MXFP4.

Source: the formats ``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized`` of compressed-tensors;
``docs/format.md``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from int4_lora.reference.checks import as_device, check_dtype, check_one_device, check_shape
from int4_lora.reference.packed_weight import PackedWeight, as_shape, row_index

__all__ = ["BaseWeight", "Float4Weight", "check_weight", "dense_dtype"]

GROUP_SIZES = {torch.float8_e4m3fn: 16, torch.uint8: 32}


@dataclass(frozen=True, eq=False)
class Float4Weight:
    """The tensors of one FP4 ``[out_features, in_features]`` weight, checked on creation.

    ``w[i, j] = code[i, j] * scale[i, j // g] / global_scale``. The dtype of ``scale`` gives the
    format:

    ======  ==========================  ===  =================================
    format  ``scale``                   g    a scale's value
    ======  ==========================  ===  =================================
    nvfp4   float8_e4m3fn               16   its own
    mxfp4   uint8, E8M0                 32   2^(scale - 127); 255 is NaN
    ======  ==========================  ===  =================================

    Args:
        packed: uint8 ``[out_features, in_features / 2]``, E2M1 codes, the even column in the low
            nibble. A code's highest bit is the sign, and the other three choose one of 0, 0.5, 1,
            1.5, 2, 3, 4, 6.
        scale: float8_e4m3fn or uint8 ``[out_features, in_features / g]``. Any value is allowed:
            NaN, zero, negative.
        shape: ``(out_features, in_features)``; g must divide in_features.
        global_scale: float32 ``[1]``, by which nvfp4 scales are divided; None means 1. Any value is
            allowed, 0 too. mxfp4 has none.

    Raises:
        TypeError: a field of the wrong type or dtype.
        ValueError: a field of the wrong shape or device, or a global scale beside E8M0 scales; the
            message names it.

    Example:
        >>> packed = torch.arange(0, 256, 17, dtype=torch.uint8)[None]  # every code, twice
        >>> weight = Float4Weight(packed, torch.tensor([[127]], dtype=torch.uint8), shape=(1, 32))
        >>> weight.format, weight.group_size, weight.nbytes
        ('mxfp4', 32, 17)

    Source:
        ``compressed_tensors/compressors/nvfp4/base.py`` and ``mxfp4/base.py``; for E2M1 and E8M0
        "OCP Microscaling Formats (MX) Specification", version 1.0, sections 5.3.3 and 5.4.
    """

    packed: Tensor
    scale: Tensor
    shape: tuple[int, int]
    global_scale: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", as_shape(self.shape))
        check_dtype("packed", self.packed, (torch.uint8,))
        check_dtype("scale", self.scale, tuple(GROUP_SIZES))
        rows, columns = self.shape
        if columns % self.group_size:
            raise ValueError(
                f"shape must have in_features that the group size of {self.format}, "
                f"{self.group_size}, divides, got {columns}"
            )
        check_shape("packed", self.packed, (rows, columns // 2), "[out_features, in_features / 2]")
        groups = (rows, columns // self.group_size)
        check_shape("scale", self.scale, groups, f"[out_features, in_features / {self.group_size}]")
        if self.global_scale is not None:
            if self.format == "mxfp4":
                raise ValueError("global_scale must be None with the E8M0 scales of mxfp4")
            check_dtype("global_scale", self.global_scale, (torch.float32,))
            check_shape("global_scale", self.global_scale, (1,), "one for the tensor")
        check_one_device(packed=self.packed, scale=self.scale, global_scale=self.global_scale)

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shape[1]

    @property
    def format(self) -> Literal["nvfp4", "mxfp4"]:
        """The format, which the dtype of the scale tells."""
        return "nvfp4" if self.scale.dtype == torch.float8_e4m3fn else "mxfp4"

    @property
    def group_size(self) -> int:
        """Columns that share a scale: 16 or 32."""
        return GROUP_SIZES[self.scale.dtype]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        tensors = (self.packed, self.scale, self.global_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, device: torch.device | str) -> Float4Weight:
        """Return the same weight with every tensor on ``device``."""
        device = as_device(device)
        return dataclasses.replace(
            self,
            packed=self.packed.to(device),
            scale=self.scale.to(device),
            global_scale=None if self.global_scale is None else self.global_scale.to(device),
        )

    def rows(self, index: Tensor | slice) -> Float4Weight:
        """Return the weight of some outputs: row ``i`` of the result is row ``index[i]``.

        Args:
            index: int64 ``[rows]`` in any order, repeats allowed, or a slice.

        Raises:
            TypeError: ``index`` is neither an int64 tensor nor a slice.
            ValueError: no rows, or a row out of range.

        Example:
            >>> packed = torch.tensor([[0x21] * 16, [0x43] * 16], dtype=torch.uint8)
            >>> scale = torch.tensor([[127], [128]], dtype=torch.uint8)
            >>> Float4Weight(packed, scale, shape=(2, 32)).rows(slice(1, 2)).scale
            tensor([[128]], dtype=torch.uint8)
        """
        index = row_index(index, self.out_features).to(self.packed.device)
        return dataclasses.replace(
            self,
            packed=self.packed[index],
            # as bytes: torch 2.8 takes no rows of float8
            scale=self.scale.view(torch.uint8)[index].view(self.scale.dtype),
            shape=(len(index), self.in_features),
        )


BaseWeight: TypeAlias = PackedWeight | Float4Weight


def check_weight(weight: object) -> None:
    """Check that ``weight`` is a weight of the reference.

    Raises:
        TypeError: it is neither a PackedWeight nor a Float4Weight.
    """
    if not isinstance(weight, (PackedWeight, Float4Weight)):
        raise TypeError(
            f"weight must be a PackedWeight or Float4Weight, got {type(weight).__name__}"
        )


def dense_dtype(weight: BaseWeight) -> torch.dtype:
    """Return the dtype of a dense weight: that of the scales, or bfloat16 for FP4."""
    return torch.bfloat16 if isinstance(weight, Float4Weight) else weight.scale.dtype
