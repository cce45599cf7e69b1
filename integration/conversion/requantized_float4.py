"""Merge adapters into FP4 modules, and quantise the modules again in their format.

The global scale of NVFP4 stays, so that modules which an engine merges go on sharing it, unless the
merged weight is too large for it; then it is that of ``int4_lora.reference.quantize_float4``.

For each group the best scale has the least sum of (w - c * s / S)^2, where c is the code nearest to
w S / s. The candidates are the min-max rule of ``quantize_float4``, the bytes next to its scale,
and the group's previous scale. So no group has a larger error than with the min-max rule.

Source: ``docs/commands/merge.md``; ``int4_lora.reference.float4_quantization`` for the rules.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from int4_lora.integration.conversion.float4_modules import float4_blocks
from int4_lora.integration.conversion.requantized_modules import RequantizedModule
from int4_lora.integration.conversion.scale_search import Requantized
from int4_lora.integration.conversion.tasks import Write
from int4_lora.reference import Float4Weight, dequantize
from int4_lora.reference.float4 import E2M1, pack_float4, scale_values
from int4_lora.reference.float4_quantization import (
    LARGEST_E2M1,
    mxfp4_scales,
    nearest_codes,
    nvfp4_global_scale,
    nvfp4_scales,
)

__all__ = ["RequantizedFloat4Module", "requantize_float4"]

ROUNDS_TO_E4M3 = 464.0  # larger numbers are nearer to the next one of E4M3, which is NaN
STEPS = {"nvfp4": (-4, -3, -2, -1, 1), "mxfp4": (-1, 1)}  # bytes from the min-max scale
LARGEST_BYTE = {"nvfp4": 0x7E, "mxfp4": 254}  # of finite positive scales


@torch.no_grad()
def requantize_float4(
    exact: Tensor, like: Float4Weight, global_scale: Tensor | None, *, search: bool = True
) -> Requantized:
    """Quantise a weight in the format of another.

    Args:
        exact: float64 ``[out_features, in_features]``.
        like: the FP4 weight to imitate, whose scales are candidates too.
        global_scale: float32 ``[1]`` of the result, None for mxfp4.
        search: whether to search for scales, or to use min-max scales.

    Raises:
        ValueError: a weight is not finite.

    Example:
        >>> from int4_lora.reference import quantize_float4
        >>> weight = torch.randn(8, 64, dtype=torch.float64)
        >>> like = quantize_float4(weight.float())
        >>> result = requantize_float4(weight, like, like.global_scale)
        >>> result.squared_error <= result.minmax_squared_error
        True
    """
    if not bool(exact.isfinite().all()):
        raise ValueError("the merged weight must be finite")
    groups = exact.view(*like.scale.shape, like.group_size)  # [rows, groups, columns of a group]
    amax = groups.abs().amax(dim=2)
    first = mxfp4_scales(amax) if global_scale is None else nvfp4_scales(amax, global_scale)
    best = first.view(torch.uint8)
    minmax = least = _errors(groups, first, global_scale)
    for candidate in _candidates(best, like) if search else ():
        errors = _errors(groups, candidate.view(like.scale.dtype), global_scale)
        better = errors < least  # not where it is NaN
        least = torch.where(better, errors, least)
        best = torch.where(better, candidate, best)
    scale = best.view(like.scale.dtype)
    codes = _codes(groups, scale, global_scale).view(exact.shape)
    weight = Float4Weight(pack_float4(codes), scale, like.shape, global_scale)
    difference = dequantize(weight, torch.float64) - exact
    return Requantized(
        weight,
        float(least.sum()),
        float(minmax.sum()),
        float(exact.square().sum()),
        float(difference.abs().max()),
    )


class RequantizedFloat4Module(RequantizedModule):
    """The tensors of an FP4 module with adapters merged into it.

    Its arguments are those of ``RequantizedModule``.
    """

    def _blocks(self) -> Iterator[tuple[int, Float4Weight]]:
        return float4_blocks(self.checkpoint, self.name)

    def _dense(self, weight: Float4Weight) -> Tensor:
        return dequantize(weight, torch.float64)

    def _begin(self, write: Write) -> None:
        """Choose the global scale by the largest merged weight, and write it."""
        full = f"{self.name}.weight_global_scale"
        self._global_scale: Tensor | None = None
        if full not in self.checkpoint.tensors:
            return
        largest, held = torch.zeros((), dtype=torch.float64), None
        for start, weight in self._blocks():
            largest = torch.maximum(largest, self._merged(start, weight)[1].abs().max())
            held = weight.global_scale
        assert held is not None
        self._global_scale = _global_scale(held, largest)
        write(full, 0, self._global_scale)

    def _requantized(self, exact: Tensor, weight: Float4Weight) -> Requantized:
        return requantize_float4(exact, weight, self._global_scale, search=self.search)

    def _write(self, write: Write, start: int, block: Float4Weight) -> None:
        """Write the rows of codes and scales for one block of rows of the weight."""
        for part, rows in (("weight_packed", block.packed), ("weight_scale", block.scale)):
            row_bytes = rows.shape[1]  # of one byte each
            write(f"{self.name}.{part}", start * row_bytes, rows.contiguous())


def _global_scale(stored: Tensor, largest: Tensor) -> Tensor:
    """Return the stored global scale where the largest weight fits under it, else its own."""
    over = float(stored)
    if 0 < over < torch.inf and float(largest) * over <= LARGEST_E2M1 * ROUNDS_TO_E4M3:
        return stored
    return nvfp4_global_scale(largest)


def _candidates(minmax: Tensor, like: Float4Weight) -> Iterator[Tensor]:
    """Yield the bytes of other scales: those near the min-max scales, and the previous ones."""
    wide = minmax.to(torch.int32)
    for step in STEPS[like.format]:
        yield (wide + step).clamp(1, LARGEST_BYTE[like.format]).to(torch.uint8)
    previous = like.scale.view(torch.uint8)
    positive = (previous > 0) & (previous <= LARGEST_BYTE[like.format])
    yield torch.where(positive, previous, minmax)


def _over(values: Tensor, global_scale: Tensor | None) -> Tensor:
    """Return values over the global scale, as ``dequantize`` divides them in float64."""
    return values if global_scale is None else values / global_scale.to(torch.float64)


def _codes(groups: Tensor, scale: Tensor, global_scale: Tensor | None) -> Tensor:
    return nearest_codes(groups / _over(scale_values(scale), global_scale).unsqueeze(2))


def _errors(groups: Tensor, scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """Return the sum of squared errors of each group."""
    codes = _codes(groups, scale, global_scale).to(torch.int64)
    table = torch.tensor(E2M1, dtype=torch.float64)
    dense = _over(table[codes] * scale_values(scale).unsqueeze(2), global_scale)
    return (dense - groups).square().sum(dim=2)
