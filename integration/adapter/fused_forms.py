"""Map adapters on split projections to fused ones, and adapters on fused projections to split ones.

==================  =================================  ==========================
the base has        the adapter has                    it becomes
==================  =================================  ==========================
``qkv_proj``        ``q_proj``, ``k_proj``, ``v_proj``  A stacked, B block by block
``gate_up_proj``    ``gate_proj``, ``up_proj``          the same; ranks add up
the split weights   the fused one                       A shared, rows of B
==================  =================================  ==========================

The fused weight has the rows of q, then k, then v; of gate, then up.

Source: ``transformers/models/phi3/modeling_phi3.py``; vLLM's ``QKVParallelLinear`` and
``MergedColumnParallelLinear``; ``MiniMaxLightningAttention`` in
``transformers/models/minimax/modeling_minimax.py``, and config.json and
``configuration_minimax_m1.py`` of MiniMax-M1.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from int4_lora.integration.adapter.adapter import AdapterModule
from int4_lora.integration.adapter.base_weights import BaseWeights

__all__ = [
    "OTHER_ORDERS",
    "PARTS",
    "Placement",
    "map_forms",
    "other_forms",
    "place",
    "unfit_modules",
]

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED = {part: fused for fused, parts in PARTS.items() for part in parts}
EQUAL = {"qkv_proj": ("k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

MINIMAX = (  # of lightning attention: in transformers, in the released files, in their own classes
    "minimax",
    "minimax_vl_01_text",
    "minimax_text_01",
    "minimax_m1",
    "MiniMaxText01",
    "MiniMaxM1",
)

# Weights of these names that are not the rows of one part after the other, by model_type: which of
# the modules that hold them, and what their rows are.
OTHER_ORDERS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "qkv_proj": {
        "codegen": ("", "four blocks, each of rows of q, v and k"),
        **dict.fromkeys(MINIMAX, ("", "rows of q, k and v of one head after the other")),
    },
    "gate_up_proj": {
        "gpt_oss": ("", "a row of gate, then one of up, and so on"),
        "phi4_multimodal": (r"\bfeed_forward_(in|out)\b", "rows of up, then of gate"),
    },
}


@dataclass(frozen=True)
class Placement:
    """Where the modules of an adapter belong in a base.

    Args:
        direct: modules that the base has.
        joined: parts of a fused weight of the base, by its name, then by the part's name.
        divided: fused modules of which the base has the parts.
        unplaced: modules that the base has in no form.
    """

    direct: dict[str, AdapterModule]
    joined: dict[str, dict[str, AdapterModule]]
    divided: dict[str, AdapterModule]
    unplaced: list[str]


def place(modules: Mapping[str, AdapterModule], base: BaseWeights) -> Placement:
    """Find the weights of a base that an adapter's modules are for, by their names alone.

    Args:
        modules: the adapter's modules, under the base's prefixes.
        base: the weights of the base.
    """
    placement = Placement({}, {}, {}, [])
    for name, module in modules.items():
        parent, dot, last = name.rpartition(".")
        if name in base.names:
            placement.direct[name] = module
        elif last in FUSED and f"{parent}{dot}{FUSED[last]}" in base.names:
            placement.joined.setdefault(f"{parent}{dot}{FUSED[last]}", {})[last] = module
        elif any(f"{parent}{dot}{part}" in base.names for part in PARTS.get(last, ())):
            placement.divided[name] = module
        else:
            placement.unplaced.append(name)
    return placement


def other_forms(name: str) -> tuple[str, ...]:
    """Return the names that the module ``name`` has where it is fused, or split.

    Example:
        >>> other_forms("model.layers.0.self_attn.k_proj")
        ('model.layers.0.self_attn.qkv_proj',)
    """
    parent, dot, last = name.rpartition(".")
    lasts = (FUSED[last],) if last in FUSED else PARTS.get(last, ())
    return tuple(f"{parent}{dot}{other}" for other in lasts)


def map_forms(
    placement: Placement, base: BaseWeights
) -> tuple[dict[str, AdapterModule], tuple[str, ...]]:
    """Return an adapter's modules in the base's forms, and notes of what was mapped.

    Args:
        placement: where the modules belong.
        base: the weights of the base.

    Raises:
        ValueError: rows do not add up, a part is missing whose place does not follow from the
            others, both forms are given for one weight, or a model's order of rows is another.
    """
    modules = dict(placement.direct)
    notes: Counter[str] = Counter()
    for name, parts in placement.joined.items():
        rows = rows_of_parts(name, parts, base)
        if name in modules:
            given = ", ".join(parts)
            raise ValueError(f"{name}: the adapter is on it and on its part {given}: remove one")
        modules[name] = _joined(name, parts, rows, _matrix_shape(name, base)[0])
        notes[_join_note(_last(name), parts)] += 1
    for name, module in placement.divided.items():
        divided = _divided(name, module, rows_in_base(name, module, base))
        both = [part for part in divided if part in modules]
        if both:
            raise ValueError(f"{name}: the adapter is on it and on its part {both[0]}: remove one")
        modules |= divided
        listed = _listed(list(PARTS[_last(name)]))
        notes[f"{_last(name)} divided for the base's {listed}: A shared, rows of B"] += 1
    return modules, tuple(f"{note} (x{count})" for note, count in notes.items())


def _join_note(fused: str, parts: Mapping[str, AdapterModule]) -> str:
    """Return what was done with an adapter's parts of a fused weight."""
    given = [part for part in PARTS[fused] if part in parts]
    if len(given) == 1:
        return f"{given[0]} taken for its rows of the base's {fused}: B is zero in the others"
    differ = len({module.scaling for module in parts.values()}) > 1
    scaled = "; their scalings differ, so B is multiplied by them in float64" if differ else ""
    return f"{_listed(given)} joined for the base's {fused}: A stacked, B in blocks{scaled}"


def unfit_modules(modules: Mapping[str, AdapterModule], base: BaseWeights) -> set[str]:
    """Return the modules that a base lacks, or has in another shape, in either form.

    Args:
        modules: the adapter's modules, under the base's prefixes.
        base: the weights of the base.
    """
    placement = place(modules, base)
    unfit = {*placement.unplaced}
    for name, module in placement.direct.items():
        if base.shape(name) not in (None, (module.b.shape[0], module.a.shape[1])):
            unfit.add(name)
    for name, parts in placement.joined.items():
        if name in placement.direct or not _join_fits(name, parts, base):
            unfit |= {f"{name.removesuffix(_last(name))}{part}" for part in parts}
    for name, module in placement.divided.items():
        both = not placement.direct.keys().isdisjoint(other_forms(name))
        if both or not _division_fits(name, module, base):
            unfit.add(name)
    return unfit


def _join_fits(name: str, parts: Mapping[str, AdapterModule], base: BaseWeights) -> bool:
    try:
        rows_of_parts(name, parts, base)
    except ValueError:
        return False
    columns = {int(module.a.shape[1]) for module in parts.values()}
    return columns == {_matrix_shape(name, base)[1]}


def _division_fits(name: str, module: AdapterModule, base: BaseWeights) -> bool:
    try:
        rows = rows_in_base(name, module, base)
    except ValueError:
        return False
    return {_matrix_shape(part, base)[1] for part in rows} == {module.a.shape[1]}


def rows_of_parts(
    name: str, parts: Mapping[str, AdapterModule], base: BaseWeights
) -> dict[str, slice]:
    """Return the rows of a fused weight that each of an adapter's parts is for.

    Args:
        name: the fused weight.
        parts: the adapter's modules by the name of the part.
        base: the weights of the base.

    Raises:
        ValueError: the rows do not follow from those of the parts, or do not add up.
    """
    fused = _last(name)
    _check_order(name, base)
    total, order = _matrix_shape(name, base)[0], PARTS[fused]
    given = {part: int(parts[part].b.shape[0]) for part in order if part in parts}
    if list(given) == ["k_proj"]:
        raise ValueError(
            f"{name}: the adapter has k_proj alone, and where its rows begin in [q_proj; k_proj; "
            "v_proj] follows from q_proj or v_proj only: add a pair of one of them whose lora_B is "
            "zero, with as many rows as it has"
        )
    rows = _rows_of_all_parts(fused, given, total)
    if rows is None:
        shown = ", ".join(f"{part} {count}" for part, count in given.items())
        raise ValueError(
            f"{name}: the base has {total} rows, which are [{'; '.join(order)}], the adapter has "
            f"{shown}: that does not add up{_equal_rows(fused, given)}"
        )
    stops = list(itertools.accumulate(rows[part] for part in order))
    return {
        part: slice(stop - rows[part], stop)
        for part, stop in zip(order, stops, strict=True)
        if part in given
    }


def _equal_rows(fused: str, given: Collection[str]) -> str:
    """Return that two parts have as many rows as each other, if the adapter does not say it."""
    first, second = EQUAL[fused]
    if fused == "qkv_proj" and {first, second} <= {*given}:
        return ""
    return f", for {first} and {second} have as many rows as each other"


def _rows_of_all_parts(fused: str, given: Mapping[str, int], total: int) -> dict[str, int] | None:
    """Return the rows of every part; None if they do not add up.

    Gate and up have as many rows as each other. So have k and v, if the adapter lacks one of them.
    """
    first, second = EQUAL[fused]
    rows = dict(given)
    for part, other in ((first, second), (second, first)):
        if other in given:
            rows.setdefault(part, given[other])
    unknown = [part for part in PARTS[fused] if part not in rows]
    each, left = divmod(total - sum(rows.values()), len(unknown) or 1)
    if left or (each < 1 if unknown else each != 0):
        return None
    rows |= dict.fromkeys(unknown, each)
    return rows if fused == "qkv_proj" or rows[first] == rows[second] else None


def rows_in_base(name: str, module: AdapterModule, base: BaseWeights) -> dict[str, slice]:
    """Return the rows of a fused module's B that are for each weight of the base, by full name.

    Args:
        name: the fused module.
        module: its pair of matrices.
        base: the weights of the base.

    Raises:
        ValueError: the base lacks one of the weights, or their rows do not add up.
    """
    _check_order(name, base)
    parent, dot, fused = name.rpartition(".")
    names = [f"{parent}{dot}{part}" for part in PARTS[fused]]
    absent = [part for part in names if part not in base.names]
    if absent:
        raise ValueError(f"{name}: the base has {fused}'s parts, but no {absent[0]}")
    sizes = [_matrix_shape(part, base)[0] for part in names]
    total, stop, rows = int(module.b.shape[0]), 0, {}
    halves = fused != "gate_up_proj" or sizes[0] == sizes[1]
    if sum(sizes) != total or not halves:
        pairs = zip(PARTS[fused], sizes, strict=True)
        shown = ", ".join(f"{part} {size}" for part, size in pairs)
        raise ValueError(
            f"{name}: the adapter has {total} rows, which are [{'; '.join(PARTS[fused])}], the "
            f"base has {shown}: that does not add up"
        )
    for part, size in zip(names, sizes, strict=True):
        rows[part] = slice(stop, stop + size)
        stop += size
    return rows


def _joined(
    name: str, parts: Mapping[str, AdapterModule], rows: Mapping[str, slice], out_features: int
) -> AdapterModule:
    """Return the module of a fused weight: A stacked, B block by block, zeros elsewhere."""
    present = [(parts[part], rows[part]) for part in PARTS[_last(name)] if part in parts]
    columns = {int(module.a.shape[1]) for module, _ in present}
    if len(columns) > 1:
        raise ValueError(f"{name}: the adapter's parts have {sorted(columns)} in_features")
    scalings = {module.scaling for module, _ in present}
    dtype = present[0][0].a.dtype
    for module, _ in present:
        dtype = torch.promote_types(dtype, module.a.dtype)
    if len(scalings) > 1:
        dtype = torch.float64
    a = torch.cat([module.a.to(dtype) for module, _ in present])  # [sum of ranks, in]
    b = torch.zeros(out_features, a.shape[0], dtype=dtype)
    first = 0
    for module, place in present:
        factor = module.scaling if len(scalings) > 1 else 1.0
        rank = module.a.shape[0]
        b[place, first : first + rank] = module.b.to(dtype) * factor
        first += rank
    return AdapterModule(a, b, scalings.pop() if len(scalings) == 1 else 1.0)


def _divided(
    name: str, module: AdapterModule, rows: Mapping[str, slice]
) -> dict[str, AdapterModule]:
    """Return the module of each part of a fused module: the same A, the part's rows of B."""
    return {
        part: AdapterModule(module.a, module.b[place], module.scaling)
        for part, place in rows.items()
    }


def _check_order(name: str, base: BaseWeights) -> None:
    """Refuse a fused weight whose rows are known to be in another order."""
    fused = _last(name)
    for model_type, (where, order) in OTHER_ORDERS[fused].items():
        if model_type in base.model_types and re.search(where, name):
            raise ValueError(
                f"{name}: config.json says model_type {model_type!r}, whose {fused} is {order}, "
                f"not [{'; '.join(PARTS[fused])}]; split and fused adapters are not mapped there"
            )


def _matrix_shape(name: str, base: BaseWeights) -> tuple[int, int]:
    shape = base.shape(name)
    if shape is None or len(shape) != 2:
        kind = "in a format whose shape is not read here" if shape is None else f"{list(shape)}"
        raise ValueError(f"{name}: the base's weight must be a matrix to be mapped, it is {kind}")
    return shape[0], shape[1]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _listed(names: list[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
