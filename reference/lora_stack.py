"""The adapters of one linear layer, and where in its output they write.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import pad

from int4_lora.reference.checks import (
    X_DTYPES,
    as_device,
    check_dtype,
    check_one_device,
    check_shape,
)
from int4_lora.reference.dequantization import dequantize
from int4_lora.reference.packed_weight import PackedWeight
from int4_lora.reference.quantization import quantize

__all__ = [
    "LoRASlice",
    "LoRAStack",
    "PackedLoRAStack",
    "check_slices_fit",
    "quantize_lora_matrix",
    "rows_of",
]


@dataclass(frozen=True, eq=False)
class LoRAStack:
    """The adapters of one linear layer, stacked: an id selects one.

    Args:
        a: ``[adapters, rank, in_features]``, float16, bfloat16, float32 or float64.
        b: ``[adapters, out_features, rank]``, of the same dtype.
        scaling: ``[adapters]``, alpha / rank of each, of any of these dtypes.

    Raises:
        TypeError: a field of the wrong dtype.
        ValueError: a field of the wrong shape or device.

    Example:
        >>> first = (torch.ones(1, 8), torch.ones(4, 1), 2 / 3)
        >>> second = (torch.ones(3, 8), torch.ones(4, 3), 1.0)
        >>> stack = LoRAStack.stack([first, second])
        >>> stack.adapters, stack.rank, stack.in_features, stack.out_features
        (2, 3, 8, 4)

    Source:
        The layout of PEFT's ``lora_A`` and ``lora_B``, with a first dimension for the adapter.
    """

    a: Tensor
    b: Tensor
    scaling: Tensor

    def __post_init__(self) -> None:
        check_dtype("a", self.a, X_DTYPES)
        check_dtype("b", self.b, (self.a.dtype,))
        check_dtype("scaling", self.scaling, X_DTYPES)
        check_shape("a", self.a, (None, None, None), "[adapters, rank, in_features]")
        if 0 in self.a.shape[1:]:
            raise ValueError(
                f"a must have rank and in_features of 1 or more, got {[*self.a.shape]}"
            )
        expected = (self.adapters, None, self.rank)
        check_shape("b", self.b, expected, "[adapters, out_features, rank]")
        check_shape("scaling", self.scaling, (self.adapters,), "[adapters]")
        check_one_device(a=self.a, b=self.b, scaling=self.scaling)

    @classmethod
    def stack(cls, adapters: Iterable[tuple[Tensor, Tensor, float]]) -> LoRAStack:
        """Stack the adapters of one layer; smaller ranks are padded with zeros.

        Padding adds 0 * x, which is 0 for finite x and NaN for an infinite one.

        Args:
            adapters: ``(a, b, scaling)`` of each: ``a [rank, in_features]`` and
                ``b [out_features, rank]``, of one dtype and device for all, and a number. The
                scaling is kept in float64, so that 2/3 stays 2/3.

        Raises:
            TypeError: a member of the wrong type or dtype.
            ValueError: no adapters, or shapes that do not fit; the message names the adapter.
        """
        given = _as_triples(adapters)
        first_a, first_b, _ = given[0]
        check_dtype("a of adapter 0", first_a, X_DTYPES)
        check_shape("a of adapter 0", first_a, (None, None), "[rank, in_features]")
        check_dtype("b of adapter 0", first_b, (first_a.dtype,))
        check_shape("b of adapter 0", first_b, (None, None), "[out_features, rank]")
        for index, (a, b, _) in enumerate(given):
            check_dtype(f"a of adapter {index}", a, (first_a.dtype,))
            check_dtype(f"b of adapter {index}", b, (first_a.dtype,))
            width = (None, first_a.shape[1])
            check_shape(f"a of adapter {index}", a, width, "[rank, in_features]")
            height = (first_b.shape[0], a.shape[0])
            check_shape(f"b of adapter {index}", b, height, "[out_features, rank]")
            if a.shape[0] < 1:
                raise ValueError(f"a of adapter {index} must have a rank of 1 or more, got 0")
            names = ("a of adapter 0", f"a of adapter {index}", f"b of adapter {index}")
            check_one_device(**dict(zip(names, (first_a, a, b), strict=True)))
        rank = max(a.shape[0] for a, _, _ in given)
        return cls(
            a=torch.stack([pad(a, (0, 0, 0, rank - a.shape[0])) for a, _, _ in given]),
            b=torch.stack([pad(b, (0, rank - b.shape[1])) for _, b, _ in given]),
            scaling=torch.tensor(
                [scaling for _, _, scaling in given], dtype=torch.float64, device=first_a.device
            ),
        )

    @property
    def adapters(self) -> int:
        """The number of adapters."""
        return self.a.shape[0]

    @property
    def rank(self) -> int:
        """The rank that all adapters are padded to."""
        return self.a.shape[1]

    @property
    def in_features(self) -> int:
        """Columns of ``a``."""
        return self.a.shape[2]

    @property
    def out_features(self) -> int:
        """Rows of each ``b``."""
        return self.b.shape[1]

    def to(self, device: torch.device | str) -> LoRAStack:
        """Return the same adapters with every tensor on ``device``."""
        device = as_device(device)
        return dataclasses.replace(
            self, a=self.a.to(device), b=self.b.to(device), scaling=self.scaling.to(device)
        )

    @torch.no_grad()
    def quantized(
        self,
        group_size: int = 128,
        *,
        symmetric: bool = True,
        scale_dtype: torch.dtype | None = None,
    ) -> PackedLoRAStack:
        """Return the same adapters with A and B in INT4, quantised by the rule of ``quantize``.

        A is quantised in groups along in_features, B in groups along the rank. A matrix with no
        more than ``group_size`` columns has one group per row. Ranks that ``stack`` padded with
        zeros stay zero.

        Args:
            group_size: columns of a matrix that share a scale.
            symmetric: whether all zero-points are 0.
            scale_dtype: float16, bfloat16 or float32; by default the dtype of ``a``, or float32
                for float64 adapters.

        Raises:
            TypeError: a wrong type.
            ValueError: a matrix has more columns than ``group_size``, which does not divide them,
                or a value that is not finite; the message names the matrix.

        Example:
            >>> stack = LoRAStack.stack([(torch.ones(16, 256), torch.ones(4, 16), 0.5)])
            >>> packed = stack.quantized()
            >>> packed.a.scale.shape, packed.b.scale.shape
            (torch.Size([16, 2]), torch.Size([4, 1]))

        Source:
            ``compressed_tensors/compressors/pack_quantized/base.py`` for the tensors.
        """
        a, b = (
            quantize_lora_matrix(
                name, matrix.flatten(0, 1), group_size, symmetric=symmetric, scale_dtype=scale_dtype
            )
            for name, matrix in (("a", self.a), ("b", self.b))
        )
        return PackedLoRAStack(a, b, self.scaling)


@dataclass(frozen=True, eq=False)
class PackedLoRAStack:
    """The adapters of one linear layer with A and B in INT4.

    ``int4_lora_linear``, ``merge`` and ``error_bound`` compute with the dequantised A and B, and
    ``compiled.prepare_lora`` dequantises them once. For slices of a layer, pass
    ``LoRASlice(packed.dequantize(), start)``.

    Args:
        a: A of all adapters, one below the other: shape ``(adapters * rank, in_features)``.
        b: B of all adapters, one below the other: shape ``(adapters * out_features, rank)``.
        scaling: ``[adapters]``, alpha / rank of each, of any float dtype.

    Raises:
        TypeError: a field of the wrong type or dtype.
        ValueError: shapes or devices that do not fit each other.

    Example:
        >>> stack = LoRAStack.stack([(torch.ones(2, 8), torch.ones(4, 2), 0.5)])
        >>> packed = stack.quantized()
        >>> packed.adapters, packed.rank, packed.in_features, packed.out_features
        (1, 2, 8, 4)
        >>> packed.nbytes, packed.dequantize().a.shape
        (56, torch.Size([1, 2, 8]))

    Source:
        ``PackedWeight`` for each matrix.
    """

    a: PackedWeight
    b: PackedWeight
    scaling: Tensor

    def __post_init__(self) -> None:
        for name, matrix in (("a", self.a), ("b", self.b)):
            if not isinstance(matrix, PackedWeight):
                raise TypeError(f"{name} must be a PackedWeight, got {type(matrix).__name__}")
        check_dtype("b.scale", self.b.scale, (self.a.scale.dtype,))
        check_dtype("scaling", self.scaling, X_DTYPES)
        check_shape("scaling", self.scaling, (None,), "[adapters]")
        if not self.adapters or self.a.out_features != self.adapters * self.rank:
            raise ValueError(
                f"a must be (adapters * rank, in_features) with {self.adapters} adapters of rank "
                f"{self.rank}, got {self.a.shape}"
            )
        if self.b.out_features % self.adapters:
            raise ValueError(
                f"b must be (adapters * out_features, rank) with {self.adapters} adapters, "
                f"got {self.b.shape}"
            )
        check_one_device(a=self.a.packed, b=self.b.packed, scaling=self.scaling)

    @property
    def adapters(self) -> int:
        """The number of adapters."""
        return self.scaling.shape[0]

    @property
    def rank(self) -> int:
        """The rank that all adapters are padded to."""
        return self.b.in_features

    @property
    def in_features(self) -> int:
        """Columns of A."""
        return self.a.in_features

    @property
    def out_features(self) -> int:
        """Rows of each B."""
        return self.b.out_features // self.adapters

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        return self.a.nbytes + self.b.nbytes + self.scaling.nbytes

    def dequantize(self) -> LoRAStack:
        """Return the adapters with A and B dequantised, in the dtype of their scales."""
        return LoRAStack(
            dequantize(self.a).reshape(self.adapters, self.rank, self.in_features),
            dequantize(self.b).reshape(self.adapters, self.out_features, self.rank),
            self.scaling,
        )

    def to(self, device: torch.device | str) -> PackedLoRAStack:
        """Return the same adapters with every tensor on ``device``."""
        device = as_device(device)
        return PackedLoRAStack(self.a.to(device), self.b.to(device), self.scaling.to(device))


def quantize_lora_matrix(
    name: str,
    matrix: Tensor,
    group_size: int,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> PackedWeight:
    """Quantise A or B of an adapter: one group per row if it has at most ``group_size`` columns.

    Args:
        name: what the messages call the matrix.
        matrix: ``[rows, columns]``, float.
        group_size: columns that share a scale.
        symmetric: whether all zero-points are 0.
        scale_dtype: as in ``quantize``.

    Raises:
        TypeError: a wrong type.
        ValueError: ``group_size`` does not divide the columns, or a value is not finite.

    Example:
        >>> quantize_lora_matrix("b", torch.ones(4, 16), 128).strategy
        'channel'
    """
    if type(group_size) is not int:
        raise TypeError(f"group_size must be an int, got {type(group_size).__name__}")
    columns = matrix.shape[1]
    if group_size < 1 or (columns > group_size and columns % group_size):
        fitting = f"; {math.gcd(columns, group_size)} does" if group_size > 1 else ""
        raise ValueError(
            f"group_size must divide the columns of {name}, {columns}, or be larger, "
            f"got {group_size}{fitting}"
        )
    size = None if columns <= group_size else group_size
    try:
        return quantize(matrix, group_size=size, symmetric=symmetric, scale_dtype=scale_dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _as_triples(
    adapters: Iterable[tuple[Tensor, Tensor, float]],
) -> list[tuple[Tensor, Tensor, float]]:
    """Return (a, b, scaling) of each adapter, the scaling as a float."""
    if not isinstance(adapters, Iterable):
        raise TypeError(f"adapters must be (a, b, scaling) triples, got {type(adapters).__name__}")
    triples = []
    for index, triple in enumerate(adapters):
        if not isinstance(triple, (tuple, list)) or len(triple) != 3:
            got = type(triple).__name__
            raise TypeError(f"adapter {index} must be (a, b, scaling), got {got}")
        a, b, scaling = triple
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
            got = type(scaling).__name__
            raise TypeError(f"scaling of adapter {index} must be a number, got {got}")
        if isinstance(scaling, int) and abs(scaling) >= 2**1023:
            raise ValueError(f"scaling of adapter {index} must fit float64, got 2**1023 or more")
        triples.append((a, b, float(scaling)))
    if not triples:
        raise ValueError("adapters must not be empty: the shapes would be unknown")
    return triples


@dataclass(frozen=True, eq=False)
class LoRASlice:
    """Adapters that write the outputs ``[start, start + stack.out_features)`` of a wider layer.

    A merged projection (qkv, gate_up) is one base weight whose parts have separate adapters.

    Args:
        stack: the adapters of this part.
        start: the first output they write.

    Raises:
        TypeError: ``stack`` is no LoRAStack, or ``start`` is not an int.
        ValueError: ``start`` is negative.

    Example:
        >>> stack = LoRAStack.stack([(torch.ones(1, 8), torch.ones(4, 1), 1.0)])
        >>> LoRASlice(stack, start=4).stop
        8

    Source:
        ``vllm/lora/layers/column_parallel_linear.py``, ``output_slices``.
    """

    stack: LoRAStack
    start: int

    def __post_init__(self) -> None:
        if not isinstance(self.stack, LoRAStack):
            raise TypeError(f"stack must be a LoRAStack, got {type(self.stack).__name__}")
        if type(self.start) is not int:
            raise TypeError(f"start must be an int, got {type(self.start).__name__}")
        if self.start < 0:
            raise ValueError(f"start must not be negative, got {self.start}")

    @property
    def stop(self) -> int:
        """The output after the last one they write."""
        return self.start + self.stack.out_features


def rows_of(slices: Sequence[LoRASlice], index: Tensor) -> list[LoRASlice]:
    """Return the adapters of some outputs: output ``i`` of the result is output ``index[i]``.

    It is the counterpart of ``PackedWeight.rows`` for adapters.

    Args:
        slices: slices of the whole layer.
        index: int64 ``[outputs]``, each a row of the layer's weight, in any order.

    Returns:
        Slices of the taken outputs: one for each run of neighbours that a given slice writes, in
        the order of the given slices. Empty where none writes any of the outputs.

    Example:
        >>> stack = LoRAStack.stack([(torch.ones(1, 8), torch.arange(4.0)[:, None], 1.0)])
        >>> (taken,) = rows_of([LoRASlice(stack, start=4)], torch.tensor([0, 7, 5]))
        >>> taken.start, taken.stack.b.flatten().tolist()
        (1, [3.0, 1.0])
    """
    taken = []
    for part in slices:
        written = (index >= part.start) & (index < part.stop)
        edge = torch.zeros(1, dtype=torch.bool, device=index.device)
        runs = torch.cat([edge, written, edge]).diff().nonzero().reshape(-1, 2)
        for first, last in runs.tolist():
            b = part.stack.b[:, index[first:last].to(part.stack.b.device) - part.start]
            taken.append(LoRASlice(dataclasses.replace(part.stack, b=b), first))
    return taken


def check_slices_fit(
    slices: Sequence[tuple[Tensor, int, int]], in_features: int, out_features: int, base: str
) -> None:
    """Check that slices have the width of a layer, stay within its outputs and do not overlap.

    Args:
        slices: ``(a, start, stop)`` of each: its A, ``[adapters, rank, in_features]``, and the
            outputs ``[start, stop)`` that it writes.
        in_features: of the layer.
        out_features: of the layer.
        base: what the messages call the layer that the adapters are added to.

    Raises:
        ValueError: a slice that does not fit the layer, or two that overlap.
    """
    for a, start, stop in slices:
        if a.shape[2] != in_features:
            raise ValueError(
                f"lora must have the in_features of {base}, {in_features}, got a of {[*a.shape]}"
            )
        if stop > out_features:
            raise ValueError(
                f"lora must write outputs of [0, {out_features}), got [{start}, {stop})"
            )
    for (_, start, stop), (_, other_start, other_stop) in combinations(slices, 2):
        if start < other_stop and other_start < stop:
            raise ValueError(
                f"slices must not overlap: [{start}, {stop}) and [{other_start}, {other_stop})"
            )
