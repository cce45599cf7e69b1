"""Golden files: inputs, exact answers and bounds, for backends in any language.

Source: ``docs/golden-format.md``; ONNX's backend tests, which are exported in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import int4_lora
from int4_lora.atomic_files import replace_files
from int4_lora.integration.conformance.golden.ordered_sums import ordered_sums
from int4_lora.reference import ExpertsWeight, Float4Weight, LoRAStack
from int4_lora.reference.conformance import Case, Manifest, Operands, answer, tensors_of
from int4_lora.reference.conformance.judging.yardstick import yardstick_rms

__all__ = ["DECLARATIONS", "VERSION", "exportable", "file_name", "write_golden"]

VERSION = 2  # 1 has no FP4 weights, and is the same otherwise
DECLARATIONS: dict[str, dict[str, Any]] = {
    "": {},
    "weight_unrounded": {"weight_rounded": False},
    "base_rounded": {"base_rounded": True},
    "weight_unrounded_base_rounded": {"weight_rounded": False, "base_rounded": True},
}
"""The roundings that a backend may declare, by the name of the bound in the file."""

EXPERT_DECLARATIONS: dict[str, dict[str, Any]] = {
    "": {},
    "weight_unrounded": {"weight_rounded": False},
    "steps_rounded": {"steps_rounded": True},
    "weight_unrounded_steps_rounded": {"weight_rounded": False, "steps_rounded": True},
}
"""The same for ``int4_moe``."""


def exportable(cases: Sequence[Case]) -> list[Case]:
    """Return the cases that are one call: only those fit a file."""
    return [case for case in cases if case.procedure == "answer" and not case.optional]


def file_name(case: str) -> str:
    """Return the name of a case's file.

    Example:
        >>> file_name("int4_linear/ragged/bf16")
        'int4_linear.ragged.bf16.safetensors'
    """
    return f"{case.replace('/', '.')}.safetensors"


def write_golden(folder: Path, cases: Sequence[Case], seed: int = 0) -> Iterator[Case]:
    """Write cases into an empty or new folder; yield each when its file is written.

    ``index.json`` is written last: a folder without it is incomplete.

    Args:
        folder: the folder.
        cases: the cases; those of several calls are left out.
        seed: of the inputs.

    Raises:
        FileExistsError: the folder is not empty.
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} must be empty or new: it holds files")
    entries = []
    for case in exportable(cases):
        operands = case.operands(seed)
        with ordered_sums():
            entry, tensors = _vector(case, operands)
        file = folder / file_name(case.name)
        save_file(tensors, file, metadata=_metadata(entry))
        _sort_header(file)
        entries.append(entry)
        yield case
    index = {
        "format": "int4-lora golden",
        "version": VERSION,
        "int4_lora": int4_lora.__version__,
        "seed": seed,
        "cases": entries,
    }
    text = json.dumps(index, indent=1, sort_keys=True) + "\n"
    replace_files({folder / "index.json": text.encode()})


def _sort_header(file: Path) -> None:
    """Sort the keys of a file's header, which the library writes in random order."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _vector(case: Case, operands: Operands) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the entry in the index, and the tensors of the file."""
    tensors = {  # copies: experts may share tensors, which a file may not
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors_of(operands).items()
    }
    bounds: dict[str, dict[str, Any]] = {}
    held = answer(case.function, operands, Manifest())
    expected = held.exact.double() if held.exact.is_floating_point() else held.exact
    tensors["expected"] = expected.contiguous()
    equal = case.equal or not bool(held.bound.any())
    if not equal:
        of_experts = case.function == "int4_moe"
        for name, flags in (EXPERT_DECLARATIONS if of_experts else DECLARATIONS).items():
            if name and case.function in ("shrink", "expand"):
                continue
            manifest = Manifest(**flags)
            declared = answer(case.function, operands, manifest)
            key = "bound" + (f".{name}" if name else "")
            tensors[key] = declared.bound.contiguous()
            bounds[name or "none"] = {
                "tensor": key,
                "rms": yardstick_rms(case.function, operands, manifest, declared),
            }
    entry = {
        "name": case.name,
        "file": file_name(case.name),
        "exercises": case.exercises,
        "function": case.function,
        "operands": sorted(set(tensors) & set(tensors_of(operands))),
        "attributes": _attributes(case, operands),
        "result": {"dtype": str(held.dtype)[6:], "shape": list(held.exact.shape)},
        "equal": equal,
        "bounds": bounds,
    }
    return entry, tensors


def _attributes(case: Case, operands: Operands) -> dict[str, Any]:
    """Return the arguments of a call that are not tensors."""
    if case.function == "pack":
        return {"dim": operands.dim}
    if case.function == "unpack":
        return {"dim": operands.dim, "size": operands.size}
    if operands.experts is not None:
        return _attributes_of_experts(operands, operands.experts)
    attributes: dict[str, Any] = {}
    weight = operands.base_weight
    if case.function == "from_gptq":
        attributes["zero_plus_one"] = operands.zero_plus_one
    if isinstance(weight, Float4Weight):
        attributes |= {
            "out_features": weight.out_features,
            "in_features": weight.in_features,
            "weight_format": weight.format,
        }
    elif weight is not None:
        attributes |= {
            "out_features": weight.out_features,
            "in_features": weight.in_features,
            "strategy": weight.strategy,
        }
        if isinstance(weight.group_size, tuple):
            attributes["block"] = list(weight.group_size)
    if operands.dtype is not None:
        attributes["dtype"] = str(operands.dtype)[6:]
    if operands.lora is not None and not isinstance(operands.lora, LoRAStack):
        attributes["slices"] = [part.start for part in operands.slices]
    return attributes


def _attributes_of_experts(operands: Operands, experts: ExpertsWeight) -> dict[str, Any]:
    """Return the arguments of ``int4_moe`` that are not tensors."""
    lora = operands.experts_lora
    slices = {
        f"{expert}.{layer}": [part.start for part in lora.slices(layer, expert)]
        for layer in ("gate_up", "down")
        for expert, entry in enumerate((lora and getattr(lora, layer)) or ())
        if lora is not None and not isinstance(entry, LoRAStack) and entry is not None
    }
    return {
        "experts": experts.count,
        "hidden": experts.hidden,
        "inter": experts.inter,
        "strategy": experts.gate_up[0].strategy,
        "activation": operands.activation,
        "weights_first": operands.weights_first,
        **({"slices": slices} if slices else {}),
    }


def _metadata(entry: dict[str, Any]) -> dict[str, str]:
    """Return the entry as strings, so that the file can be used without the index."""
    metadata = {"case": entry["name"], "function": entry["function"]}
    for name, value in entry["attributes"].items():
        metadata[name] = value if isinstance(value, str) else json.dumps(value)
    metadata["result_dtype"] = entry["result"]["dtype"]
    return metadata
