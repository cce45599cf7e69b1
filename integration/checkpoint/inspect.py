"""Describe a checkpoint, module by module, and check whether adapters fit it.

Only headers and scales are read, so even a large model takes seconds.

Source: ``docs/format.md``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from int4_lora.integration.adapter.adapter import Adapter
from int4_lora.integration.adapter.experts import check_all_experts
from int4_lora.integration.adapter.fitting import check_used, fit_adapter
from int4_lora.integration.adapter.stack import check_fits
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.unpacked_weights import unpacked_notes
from int4_lora.integration.conversion.saved_copies import without_copies

__all__ = ["AdapterReport", "Inspection", "ModuleReport", "UnlistedReport", "inspect"]

DTYPE_BITS = re.compile(r"[A-Z]+(\d+)")
LAYER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class ModuleReport:
    """One quantised module.

    Args:
        name: the module's name.
        format: compressed-tensors' name of the format, or "gptq", "gptq_v2" or "awq".
        bits: bits of a code.
        strategy: which weights share a scale.
        group_size: columns of a group, (rows, columns) of a block, or None.
        symmetric: whether the weight has no zero-points.
        g_idx: whether a g_idx assigns columns to groups; one with -1 does not.
        scale_dtype: the safetensors name of the scale's dtype.
        shape: ``[out_features, in_features]``.
        nbytes: bytes of the module's tensors.
        nan_scales: the number of scales that are NaN.
        infinite_scales: the number of scales that are infinite.
        zero_scales: the number of scales that are zero.
        packed: whether this package reads the module, so that an adapter can target it.
    """

    name: str
    format: str
    bits: int
    strategy: str
    group_size: int | tuple[int, int] | None
    symmetric: bool
    g_idx: bool
    scale_dtype: str
    shape: Sequence[int]
    nbytes: int
    nan_scales: int
    infinite_scales: int
    zero_scales: int
    packed: bool

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same weight in bfloat16."""
        return 2 * math.prod(self.shape)

    @property
    def kind(self) -> str:
        """The module's name without its layer number, the same for all layers of a stack."""
        return LAYER.sub(".*", self.name)


@dataclass(frozen=True)
class AdapterReport:
    """One adapter, and whether it fits the checkpoint.

    Args:
        path: the adapter's folder.
        base: the base model that the adapter's config names, or None.
        targets: the number of layers it targets, by the last part of their names.
        ranks: the ranks of its layers.
        scalings: the scalings of its layers.
        fault: why it does not fit, or None.
        notes: what was done to make it fit, such as modules renamed.
        replaced: the tensors of the base that it replaces: how many rows of each, or None for all.
    """

    path: str
    base: str | None
    targets: Mapping[str, int]
    ranks: Sequence[int]
    scalings: Sequence[float]
    fault: str | None
    notes: Sequence[str] = ()
    replaced: Mapping[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class UnlistedReport:
    """The tensors of one file that are not listed as the model's.

    Args:
        file: the file's name.
        tensors: the names of tensors that no list names.
        copies: the names of tensors that are listed in another file.
        fault: why the file cannot be read, or None.
    """

    file: str
    tensors: Sequence[str]
    copies: Sequence[str]
    fault: str | None


@dataclass(frozen=True)
class Inspection:
    """The description of a checkpoint, and of adapters for it.

    Args:
        path: the checkpoint's folder.
        modules: the quantised modules.
        dense_tensors: the number of other tensors.
        dense_bytes: the bytes of the other tensors.
        lora_targets: the last parts of the names of modules that adapters can target.
        adapters: the adapters.
        unlisted: the files with tensors that are not listed as the model's.
        notes: where config.json and the tensors contradict each other, one sentence each.
    """

    path: str
    modules: Sequence[ModuleReport]
    dense_tensors: int
    dense_bytes: int
    lora_targets: Sequence[str]
    adapters: Sequence[AdapterReport]
    unlisted: Sequence[UnlistedReport] = ()
    notes: Sequence[str] = ()

    @property
    def right(self) -> bool:
        """Whether every scale is finite and every adapter fits."""
        scales = all(one.nan_scales == one.infinite_scales == 0 for one in self.modules)
        return scales and all(one.fault is None for one in self.adapters)


def inspect(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter] = (),
    rename: Sequence[tuple[str, str]] = (),
) -> Inspection:
    """Describe a checkpoint, and check whether adapters fit it.

    Args:
        checkpoint: an open checkpoint.
        adapters: adapters to check.
        rename: how their modules are renamed, as in ``fit_adapter``.

    Returns:
        The description.

    Raises:
        ValueError: a file cannot be read, a module has no scale or shape, or a rule of ``rename``
            applies to nothing.

    Example:
        >>> report = inspect(open_checkpoint("my-model-W4A16"))  # doctest: +SKIP
        >>> report.lora_targets  # doctest: +SKIP
        ['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj']

    """
    check_used(rename, adapters)
    modules = [_module(checkpoint, name) for name in checkpoint.modules()]
    described = {
        f"{name}.{part}"
        for name in checkpoint.modules()
        for part in ("weight", *checkpoint.layout(name).parts)
    }
    others = [name for name in checkpoint.tensors if name not in described]
    return Inspection(
        path=str(checkpoint.path),
        modules=modules,
        dense_tensors=len(others),
        dense_bytes=sum(_nbytes(checkpoint, name) for name in others),
        lora_targets=sorted({part.name.rpartition(".")[2] for part in modules if part.packed}),
        unlisted=[
            UnlistedReport(one.file.name, [*one.tensors], [*one.copies], one.fault)
            for one in checkpoint.unlisted
        ],
        adapters=[_adapter(checkpoint, adapter, rename) for adapter in adapters],
        notes=unpacked_notes(checkpoint),
    )


def _module(checkpoint: Checkpoint, name: str) -> ModuleReport:
    scheme = checkpoint.schemes[name]
    layout = checkpoint.layout(name)
    names = dict.fromkeys(("weight", *layout.parts))
    parts = [part for part in names if part != "weight_shape"]
    present = [part for part in parts if f"{name}.{part}" in checkpoint.tensors]
    if checkpoint.is_packed(name) or checkpoint.is_float4(name):
        checkpoint.check(name)
    elif "weight_scale" not in present or not {"weight", "weight_packed"} & {*present}:
        raise ValueError(
            f"{checkpoint.path}: {name}: a {scheme.format} module needs weight_scale, and weight "
            f"or weight_packed, got {present}"
        )
    scale = checkpoint.tensor(f"{name}.{layout.scale}")
    special = _special_float4_scales if checkpoint.is_float4(name) else _special_scales
    nan, infinite, zero = special(scale)
    return ModuleReport(
        name=name,
        format=scheme.format,
        bits=scheme.bits,
        strategy=scheme.strategy,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        g_idx=layout.g_idx in present
        and not (checkpoint.is_packed(name) and checkpoint.column_order(name)),
        scale_dtype=checkpoint.tensors[f"{name}.{layout.scale}"].dtype,
        shape=_shape(checkpoint, name),
        nbytes=sum(_nbytes(checkpoint, f"{name}.{part}") for part in present),
        nan_scales=nan,
        infinite_scales=infinite,
        zero_scales=zero,
        packed=checkpoint.is_packed(name),
    )


def _shape(checkpoint: Checkpoint, name: str) -> list[int]:
    """Return the dense shape, from weight_shape or from the shape of the stored weight."""
    known = checkpoint.is_packed(name) or checkpoint.is_float4(name)
    if f"{name}.weight_shape" in checkpoint.tensors or known:
        return list(checkpoint.shape_of(name))
    if f"{name}.weight" in checkpoint.tensors:
        return list(checkpoint.tensors[f"{name}.weight"].shape)
    *rows, halves = checkpoint.tensors[f"{name}.weight_packed"].shape  # two 4-bit floats a byte
    return [*rows, 2 * halves]


def _nbytes(checkpoint: Checkpoint, name: str) -> int:
    stored = checkpoint.tensors[name]
    match = DTYPE_BITS.match(stored.dtype)
    return math.prod(stored.shape) * (int(match[1]) if match else 8) // 8  # BOOL has no number


def _special_scales(scale: Tensor) -> tuple[int, int, int]:
    """Return how many scales are NaN, infinite and zero, usually in a single pass."""
    if not scale.is_floating_point() or scale.element_size() == 1 or scale.numel() == 0:
        return 0, 0, 0  # float8 and integer exponents have neither infinities nor a cheap test
    integer, magnitude, infinity = {
        torch.float16: (torch.int16, 0x7FFF, 0x7C00),
        torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
        torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
        torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    }[scale.dtype]
    sizes = scale.contiguous().view(integer) & magnitude  # bit patterns of |scale| are ordered
    smallest, largest = (int(size) for size in torch.aminmax(sizes))
    nan = int((sizes > infinity).sum()) if largest > infinity else 0
    infinite = int((sizes == infinity).sum()) if largest >= infinity else 0
    zero = sizes.numel() - int(torch.count_nonzero(sizes)) if smallest == 0 else 0
    return nan, infinite, zero


def _special_float4_scales(scale: Tensor) -> tuple[int, int, int]:
    """Return how many FP4 scales are NaN, infinite (none can be) and zero."""
    if scale.dtype == torch.uint8:  # E8M0
        return int((scale == 255).sum()), 0, 0
    magnitude = scale.view(torch.uint8) & 0x7F
    return int((magnitude == 0x7F).sum()), 0, int((magnitude == 0).sum())


def _adapter(
    checkpoint: Checkpoint, adapter: Adapter, rename: Sequence[tuple[str, str]]
) -> AdapterReport:
    fault = None
    try:
        adapter = without_copies(fit_adapter(adapter, checkpoint, rename), checkpoint)
        check_all_experts(adapter, checkpoint)
        check_fits(adapter, checkpoint)
    except ValueError as error:
        fault = str(error)
    parts = adapter.modules.values()
    return AdapterReport(
        path=str(adapter.path),
        base=adapter.config.get("base_model_name_or_path"),
        targets=dict(sorted(Counter(name.rpartition(".")[2] for name in adapter.modules).items())),
        ranks=sorted({int(part.a.shape[0]) for part in parts}),
        scalings=sorted({part.scaling for part in parts}),
        fault=fault,
        notes=adapter.notes,
        replaced={
            name: None if replacement.rows is None else len(replacement.rows)
            for name, replacement in adapter.replacements.items()
        },
    )
