"""The claims of a backend: the operands it takes, and the roundings it makes.

A case outside the claims is skipped, counted and printed; every other case is judged.

Source: ``docs/conformance.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.reference import Float4Weight, LoRASlice, LoRAStack, PackedWeight
from int4_lora.reference.conformance.cases.operands import Operands

__all__ = ["FUNCTIONS", "Manifest"]

FUNCTIONS = (
    "pack",
    "unpack",
    "dequantize",
    "int4_linear",
    "int4_lora_linear",
    "shrink",
    "expand",
    "from_gptq",
    "from_awq",
    "int4_moe",
)
FORMATS = ("int4", "nvfp4", "mxfp4")
STRATEGIES = ("tensor", "channel", "group", "block")
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Manifest:
    """The claims of a backend; the defaults claim everything but float64 and FP4 weights.

    Args:
        formats: of weights, of "int4", "nvfp4", "mxfp4".
        dtypes: of x.
        scale_dtypes: of the weight's scales.
        scale_dtype_of_x: whether the scales must have the dtype of x.
        groups: numbers of columns that share a scale, 0 for a whole row; None for any.
        strategies: of "tensor", "channel", "group", "block".
        symmetric: True for weights without zero-points only, False for weights with them only,
            None for both.
        g_idx: whether ``g_idx`` is allowed.
        finite_scales: whether scales must be finite.
        in_multiple: in_features must be a multiple of it.
        out_multiple: out_features must be a multiple of it.
        bias: whether a bias is allowed.
        slices: whether adapters may be slices.
        max_rank: the largest rank; None for any.
        max_adapters: the largest number of adapters; None for any.
        devices: device types; None for any.
        contiguous: whether results are contiguous.
        deterministic: whether a repeated call gives the same bits.
        accumulate: the dtype of the sums (float64 where x is float64).
        weight_rounded: whether (q - z) * s is rounded to the scale's dtype before use.
        base_rounded: whether the base is rounded to the dtype of x before bias or delta is added.
        delta_rounded: whether x A^T, B multiplied by the scaling, and the delta are rounded to the
            dtype of x.
        steps_rounded: whether the results of an expert's steps are rounded to the dtype of x.

    Raises:
        TypeError: a claim of the wrong type.
        ValueError: a name that is no claim.

    Example:
        >>> Manifest.of({"dtypes": ["bfloat16"], "max_rank": 64}).max_rank
        64

    Source:
        ``accumulate``, ``weight_rounded`` and ``base_rounded`` are those of
        ``int4_lora.reference.error_bound``, ``steps_rounded`` that of ``moe_error_bound``;
        ``delta_rounded`` describes operators that add adapters to a 16-bit base.
    """

    formats: tuple[str, ...] = ("int4",)
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    scale_dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    scale_dtype_of_x: bool = False
    groups: tuple[int, ...] | None = None
    strategies: tuple[str, ...] = STRATEGIES
    symmetric: bool | None = None
    g_idx: bool = True
    finite_scales: bool = False
    in_multiple: int = 1
    out_multiple: int = 1
    bias: bool = True
    slices: bool = True
    max_rank: int | None = None
    max_adapters: int | None = None
    devices: tuple[str, ...] | None = None
    contiguous: bool = True
    deterministic: bool = True
    accumulate: torch.dtype = torch.float32
    weight_rounded: bool = True
    base_rounded: bool = False
    delta_rounded: bool = False
    steps_rounded: bool = False

    def __post_init__(self) -> None:
        for name, allowed in RULES.items():
            value = getattr(self, name)
            if not allowed(value):
                raise TypeError(f"manifest: {name} cannot be {value!r}")

    @classmethod
    def of(cls, claims: Manifest | Mapping[str, object] | None) -> Manifest:
        """Return the claims of a backend that has a Manifest, a mapping, or None.

        In a mapping, lists stand for tuples and names for dtypes, so that JSON can be read.
        """
        if isinstance(claims, Manifest):
            return claims
        if claims is None:
            return cls()
        if not isinstance(claims, Mapping):
            raise TypeError(f"manifest must be a mapping, got {type(claims).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        for name in claims:
            if name not in known:
                raise ValueError(f"manifest: there is no {name!r}; there are {sorted(known)}")
        return cls(**{name: _read(value) for name, value in claims.items()})  # type: ignore[arg-type]

    def sums_of(self, value: Tensor) -> torch.dtype:
        """Return the dtype of sums over ``value``."""
        return torch.float64 if value.dtype == torch.float64 else self.accumulate

    def why_not(self, operands: Operands) -> str | None:
        """Return why these operands are outside the claims, or None."""
        experts = operands.experts
        weights = (
            [operands.base_weight] if experts is None else [experts.gate_up[0], experts.down[0]]
        )
        of_weights = [why for weight in weights for why in self._of_weight(operands, weight)]
        reasons = (*self._of_activations(operands), *of_weights)
        return next((why for holds, why in reasons if holds), None)

    def _of_activations(self, operands: Operands) -> list[tuple[bool, str]]:
        x, slices = operands.x if operands.h is None else operands.h, _slices(operands)
        reasons: list[tuple[bool, str]] = []
        if x is not None:
            reasons.append((x.dtype not in self.dtypes, f"x is {_name(x.dtype)}"))
        if slices:
            rank = max(part.stack.rank for part in slices)
            count = slices[0].stack.adapters
            sliced = not self.slices and _are_slices(operands)
            reasons.append((sliced, "slices"))
            reasons.append((self.max_rank is not None and rank > self.max_rank, f"rank {rank}"))
            many = self.max_adapters is not None and count > self.max_adapters
            reasons.append((many, f"{count} adapters"))
        reasons.append((not self.bias and operands.bias is not None, "a bias"))
        return reasons

    def _of_weight(
        self, operands: Operands, weight: PackedWeight | Float4Weight | None
    ) -> list[tuple[bool, str]]:
        if weight is None:
            return []
        form = weight.format if isinstance(weight, Float4Weight) else "int4"
        return [
            (form not in self.formats, f"{form} weights"),
            (weight.in_features % self.in_multiple != 0, f"in_features {weight.in_features}"),
            (weight.out_features % self.out_multiple != 0, f"out_features {weight.out_features}"),
            *([] if isinstance(weight, Float4Weight) else self._of_int4_weight(operands, weight)),
        ]

    def _of_int4_weight(self, operands: Operands, weight: PackedWeight) -> list[tuple[bool, str]]:
        size = 0
        if weight.strategy == "group":
            size = weight.in_features // weight.scale.shape[1]
        zero_points = "without" if weight.symmetric else "with"
        of_x = self.scale_dtype_of_x and operands.x is not None
        dtype = weight.scale.dtype
        return [
            (weight.strategy not in self.strategies, f"strategy {weight.strategy}"),
            (dtype not in self.scale_dtypes, f"{_name(dtype)} scales"),
            (of_x and operands.x.dtype != dtype, "scales of another dtype than x"),  # type: ignore[union-attr]
            (
                self.groups is not None
                and weight.strategy in ("group", "channel")
                and size not in self.groups,
                f"groups of {size}" if size else "one scale for a row",
            ),
            (
                self.symmetric is not None and self.symmetric != weight.symmetric,
                f"a weight {zero_points} zero-points",
            ),
            (not self.g_idx and weight.g_idx is not None, "g_idx"),
            (
                self.finite_scales and not bool(weight.scale.isfinite().all()),
                "scales that are not finite",
            ),
        ]


def _slices(operands: Operands) -> tuple[LoRASlice, ...]:
    """Return the adapters of a layer, or those of all layers of all experts."""
    lora = operands.experts_lora
    if lora is None:
        return operands.slices
    return tuple(
        part
        for expert in range(lora.count)
        for layer in ("gate_up", "down")
        for part in lora.slices(layer, expert)
    )


def _are_slices(operands: Operands) -> bool:
    """Return whether any layer has slices instead of adapters of the whole output."""
    lora = operands.experts_lora
    entries = (operands.lora,) if lora is None else (*(lora.gate_up or ()), *(lora.down or ()))
    return any(entry is not None and not isinstance(entry, LoRAStack) for entry in entries)


def _read(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(_read(item) for item in value)
    return DTYPES.get(value, value) if isinstance(value, str) else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _all(value: object, of: Callable[[object], bool]) -> bool:
    return isinstance(value, tuple) and all(of(item) for item in value)


def _is_dtype(value: object) -> bool:
    return isinstance(value, torch.dtype) and value in DTYPES.values()


def _is_bool(value: object) -> bool:
    return type(value) is bool


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0


RULES: dict[str, Callable[[object], bool]] = {
    "dtypes": lambda value: _all(value, _is_dtype),
    "scale_dtypes": lambda value: _all(value, _is_dtype),
    "groups": lambda value: value is None or _all(value, _is_size),
    "formats": lambda value: _all(value, FORMATS.__contains__),
    "strategies": lambda value: _all(value, STRATEGIES.__contains__),
    "symmetric": lambda value: value is None or _is_bool(value),
    "in_multiple": lambda value: _is_size(value) and value != 0,
    "out_multiple": lambda value: _is_size(value) and value != 0,
    "max_rank": lambda value: value is None or _is_size(value),
    "max_adapters": lambda value: value is None or _is_size(value),
    "devices": lambda value: value is None or _all(value, lambda item: isinstance(item, str)),
    "accumulate": _is_dtype,
    **dict.fromkeys(
        (
            "scale_dtype_of_x",
            "g_idx",
            "finite_scales",
            "bias",
            "slices",
            "contiguous",
            "deterministic",
            "weight_rounded",
            "base_rounded",
            "delta_rounded",
            "steps_rounded",
        ),
        _is_bool,
    ),
}
