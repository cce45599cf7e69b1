"""Compare every module with compressed-tensors' decompression, bit for bit.

Source: ``docs/format.md`` for the known faults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from int4_lora.integration.checkpoint.compressed_tensors import (
    decompress_module,
    decompress_tensors,
    stored_tensors,
    upstream_scheme,
)
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.reference import Float4Weight, PackedWeight, dequantize
from int4_lora.reference.rounding import round_once

__all__ = ["Finding", "Verdict", "verify"]

Verdict = Literal["same", "upstream_wrong", "different", "unreadable", "not_int4"]


@dataclass(frozen=True)
class Finding:
    """The result for one module.

    Args:
        name: the module's name.
        verdict: "same" if the bits are equal; "upstream_wrong" if compressed-tensors fails or makes
            a known mistake; "different" if its bits differ otherwise; "unreadable" if the tensors
            cannot be read or contradict each other; "not_int4" for a format that is not compared:
            neither INT4, INT8 nor FP4.
        detail: the reason for the verdict; empty for "same".
    """

    name: str
    verdict: Verdict
    detail: str = ""


def verify(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Return a finding for each quantised module, one by one, in the checkpoint's order.

    Args:
        checkpoint: an open checkpoint.

    Raises:
        ValueError: tensors are unlisted, so that modules might be missing.

    Example:
        >>> findings = verify(checkpoint)  # doctest: +SKIP
        >>> [finding.name for finding in findings if finding.verdict != "same"]  # doctest: +SKIP
        []

    Source:
        ``compressed_tensors/compressors/pack_quantized/base.py``.
    """
    checkpoint.check_listed()
    return (_verify(checkpoint, name) for name in checkpoint.modules())


def _verify(checkpoint: Checkpoint, name: str) -> Finding:
    if checkpoint.is_float4(name):
        return _verify_float4(checkpoint, name)
    if not checkpoint.is_packed(name):
        scheme = checkpoint.schemes[name]
        return Finding(name, "not_int4", f"{scheme.format}, {scheme.kind}, {scheme.bits} bits")
    try:
        weight = checkpoint.packed_weight(name)
        tensors = stored_tensors(checkpoint, name)
    except (OSError, TypeError, ValueError) as error:
        return Finding(name, "unreadable", str(error))
    ours = dequantize(weight)
    try:
        scheme = checkpoint.schemes[name]
        theirs = decompress_tensors(tensors, upstream_scheme(scheme), scheme.format)
    except Exception as error:  # its tensor code can raise any exception
        detail = f"compressed-tensors cannot decompress it: {type(error).__name__}: {error}"
        return Finding(name, "upstream_wrong", detail.partition("\n")[0])
    if same_bits(ours, theirs):
        return Finding(name, "same")
    for detail, mistaken in _known_mistakes(weight):
        if same_bits(dequantize(mistaken), theirs):
            return Finding(name, "upstream_wrong", detail)
    wrong = "another shape or dtype"
    if ours.shape == theirs.shape and ours.dtype == theirs.dtype:
        wrong = f"{int((ours != theirs).sum())} of {ours.numel()} weights differ"
    return Finding(name, "different", wrong)


def _verify_float4(checkpoint: Checkpoint, name: str) -> Finding:
    """Compare an FP4 module in bfloat16, to which compressed-tensors' weight is rounded."""
    try:
        weight = checkpoint.float4_weight(name)
    except (OSError, TypeError, ValueError) as error:
        return Finding(name, "unreadable", str(error))
    ours = dequantize(weight)
    try:
        theirs = round_once(decompress_module(checkpoint, name), ours.dtype)
    except ValueError as error:
        detail = str(error).removeprefix(f"{checkpoint.path}: {name}: ")
        return Finding(name, "upstream_wrong", detail)
    if same_bits(ours, theirs):
        return Finding(name, "same")
    if ours.shape != theirs.shape:
        return Finding(name, "different", "another shape or dtype")
    known = _nan_scales(weight) | _one_place_apart(ours, theirs)
    if not bool((known | _same_elements(ours, theirs)).all()):
        differ = int((~_same_elements(ours, theirs)).sum())
        return Finding(name, "different", f"{differ} of {ours.numel()} weights differ")
    reasons = []
    if bool(_nan_scales(weight).any()):
        reasons.append("E8M0 scales of 255, which are NaN, are taken for 2^128")
    apart = int((_one_place_apart(ours, theirs) & ~_nan_scales(weight)).sum())
    if apart:
        reasons.append(
            f"{apart} of {ours.numel()} weights are rounded in steps, and are one place off"
        )
    return Finding(name, "upstream_wrong", "; ".join(reasons))


def _nan_scales(weight: Float4Weight) -> Tensor:
    """Return which weights have an E8M0 scale of 255: bool, of the weight's shape."""
    is_nan = (weight.scale.view(torch.uint8) == 255) & (weight.format == "mxfp4")
    return is_nan.repeat_interleave(weight.group_size, dim=1)


def _one_place_apart(first: Tensor, second: Tensor) -> Tensor:
    """Return which bfloat16 elements are neighbours of one sign."""
    bits = [tensor.contiguous().view(torch.int16).to(torch.int32) for tensor in (first, second)]
    return ((bits[0] - bits[1]).abs() == 1) & ~first.isnan() & ~second.isnan()


def _same_elements(first: Tensor, second: Tensor) -> Tensor:
    """Return which bfloat16 elements have the same bits, or are both NaN."""
    same = first.contiguous().view(torch.int16) == second.contiguous().view(torch.int16)
    return same | (first.isnan() & second.isnan())


def _known_mistakes(weight: PackedWeight) -> Iterator[tuple[str, PackedWeight]]:
    """Yield each known mistake of compressed-tensors, and the weight as misread by it."""
    if not weight.column_order and weight.in_features % weight.scale.shape[1] == 0:
        yield "weight_g_idx is ignored", dataclasses.replace(weight, g_idx=None, group_size=None)
    if isinstance(weight.group_size, tuple):
        rows, columns = weight.shape
        inferred = (rows // weight.scale.shape[0], columns // weight.scale.shape[1])
        fits = (-(-rows // inferred[0]), -(-columns // inferred[1])) == tuple(weight.scale.shape)
        if inferred != weight.group_size and fits:
            detail = f"blocks are taken to be {inferred}, not {weight.group_size}"
            yield detail, dataclasses.replace(weight, group_size=inferred)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two float tensors have the same bits; any NaN equals any NaN.

    Example:
        >>> same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
        False
    """
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    nan = first.isnan()
    if not torch.equal(nan, second.isnan()):
        return False
    zero = torch.zeros((), dtype=first.dtype)
    bits = [torch.where(nan, zero, part).contiguous().view(integer) for part in (first, second)]
    return torch.equal(*bits)
