"""Check results against golden files, using the files alone.

Source: ``docs/golden-format.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from int4_lora.integration.conformance.golden.recorded import NO_FILE, read_result
from int4_lora.integration.conformance.golden.write import VERSION
from int4_lora.reference import (
    AWQTensors,
    ExpertsLoRA,
    ExpertsWeight,
    Float4Weight,
    GPTQTensors,
    LoRASlice,
    LoRAStack,
    PackedWeight,
)
from int4_lora.reference.conformance import Answer, Manifest, Operands, Outcome, answer, judge
from int4_lora.reference.conformance.diagnosis.search import Diagnostician
from int4_lora.reference.conformance.evidence import JudgedCall, Witness
from int4_lora.reference.conformance.judging.answers import WEIGHTS
from int4_lora.reference.conformance.judging.yardstick import yardstick_rms
from int4_lora.reference.conformance.manifest import DTYPES
from int4_lora.reference.conformance.reproduce import affected

__all__ = ["check_golden", "read_index"]

LAYERS = ("gate_up", "down")  # of an expert


def read_index(folder: Path) -> dict[str, Any]:
    """Return the index of a folder of golden files.

    Raises:
        ValueError: there is none, or it has another version.
    """
    file = folder / "index.json"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(index, dict) or index.get("format") != "int4-lora golden":
        raise ValueError(f"{file}: it is no index of golden files")
    if index.get("version") not in range(1, VERSION + 1):
        raise ValueError(f"{file}: version must be 1 to {VERSION}, got {index.get('version')!r}")
    named = isinstance(index.get("cases"), list) and all(
        isinstance(case, dict) and isinstance(case.get("file"), str) and "/" not in case["file"]
        for case in index["cases"]
    )
    if not named or not isinstance(index.get("seed"), int):
        raise ValueError(f"{file}: it needs a seed, and cases that each name a file in the folder")
    return index


def check_golden(
    folder: Path, results: Path, manifest: Manifest, *, evidence: bool = False
) -> Iterator[Outcome]:
    """Judge result files against golden files; yield the outcome of each case.

    Args:
        folder: a folder that ``golden write`` wrote.
        results: a folder with a file of the same name for each case, whose tensor is "result".
        manifest: the backend's claims.
        evidence: whether outcomes keep their evidence.

    Raises:
        ValueError: a file cannot be read, or there is no result at all.
    """
    entries = read_index(folder)["cases"]
    if not any((results / entry["file"]).exists() for entry in entries):
        raise ValueError(f"{results}: there is no result of any of the cases of {folder}")
    diagnostician = Diagnostician()
    for entry in entries:
        try:
            outcome, call = _outcome(entry, folder, results, manifest, diagnostician)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{folder / entry['file']}: it is not what was written: {why}"
            ) from error
        if evidence and call is not None:
            witness = Witness(entry["function"])
            witness.add(call)
            outcome = replace(outcome, evidence=witness.evidence())
        yield outcome


def _outcome(
    entry: dict[str, Any],
    folder: Path,
    results: Path,
    manifest: Manifest,
    diagnostician: Diagnostician,
) -> tuple[Outcome, JudgedCall | None]:
    """Return the outcome of a case, and its call if the result has the right form."""
    passed = Outcome(entry["name"], entry["exercises"], "passed")
    try:
        tensors = load_file(folder / entry["file"])
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{folder / entry['file']}: {error}") from error
    operands = _operands(entry, tensors)
    why = manifest.why_not(operands)
    if why is None and not (results / entry["file"]).exists():
        why = NO_FILE
    if why is not None:
        return replace(passed, status="skipped", message=why), None
    result = read_result(results / entry["file"])
    declared = _declaration(entry, manifest)
    held = _answer(entry, tensors, declared)
    yardstick = None if declared is None else declared["rms"]
    if not _has_bound_for(entry, manifest):
        held = answer(entry["function"], operands, manifest)
        yardstick = yardstick_rms(entry["function"], operands, manifest, held)
    finding = judge(result, held, equal=entry["equal"], yardstick=yardstick)
    right_form = finding is None or finding.rule != "form"
    call = JudgedCall(operands, result, held, finding) if right_form else None
    if finding is None:
        return passed, call
    explanations = diagnostician.explain(entry["function"], operands, result, manifest)
    where = affected(entry["function"], operands, finding.wrong)
    outcome = replace(
        passed,
        status="failed",
        rule=finding.rule,
        message=finding.message,
        where=where,
        explanations=tuple(explanations),
        snippet=_snippet(folder, results, entry, tensors),
        elements=result.numel(),
    )
    return outcome, call


def _snippet(folder: Path, results: Path, entry: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return Python that shows a result beside what was expected."""
    shown = ["result", "golden['expected']"] + ["golden['bound']"] * ("bound" in tensors)
    return "\n".join(
        [
            "from safetensors.torch import load_file",
            f"golden = load_file({str(folder / entry['file'])!r})",
            f"result = load_file({str(results / entry['file'])!r})['result']",
            f"print({', '.join(shown)}, sep='\\n')",
        ]
    )


def _has_bound_for(entry: dict[str, Any], manifest: Manifest) -> bool:
    """Return whether the files hold a bound for the declared roundings."""
    if manifest.delta_rounded or manifest.accumulate != torch.float32:
        return bool(entry["equal"])
    return manifest.weight_rounded or entry["function"] not in WEIGHTS


def _declaration(entry: dict[str, Any], manifest: Manifest) -> dict[str, Any] | None:
    """Return the bounds for the declared roundings, or None where the files hold none."""
    words = [] if manifest.weight_rounded else ["weight_unrounded"]
    if entry["function"] == "int4_moe":
        words += ["steps_rounded"] if manifest.steps_rounded else []
    else:
        words += ["base_rounded"] if manifest.base_rounded else []
    bounds: dict[str, dict[str, Any]] = entry["bounds"]
    return bounds.get("_".join(words) or "none") or bounds.get("none")


def _answer(
    entry: dict[str, Any], tensors: dict[str, Tensor], declared: dict[str, Any] | None
) -> Answer:
    expected, dtype = tensors["expected"], RESULT_DTYPES[entry["result"]["dtype"]]
    if entry["function"] in WEIGHTS:
        expected = expected.to(dtype)
    if declared is None:
        bound = torch.zeros(expected.shape, dtype=torch.float64)
    else:
        bound = tensors[declared["tensor"]]
        if not bool((bound >= 0).all()):
            raise ValueError(f"{entry['file']}: {declared['tensor']} must not be negative or NaN")
        if bound.shape != expected.shape:
            raise ValueError(
                f"{entry['file']}: {declared['tensor']} must have the shape of expected"
            )
    return Answer(expected, dtype, bound, (expected,))


def _operands(entry: dict[str, Any], tensors: dict[str, Tensor]) -> Operands:
    attributes = entry["attributes"]
    weight: PackedWeight | Float4Weight | None = None
    if "weight_format" in attributes:
        weight = Float4Weight(
            tensors["weight.packed"],
            tensors["weight.scale"],
            shape=(attributes["out_features"], attributes["in_features"]),
            global_scale=tensors.get("weight.global_scale"),
        )
    elif "weight.packed" in tensors:
        block = attributes.get("block")
        weight = PackedWeight(
            tensors["weight.packed"],
            tensors["weight.scale"],
            shape=(attributes["out_features"], attributes["in_features"]),
            zero_point=tensors.get("weight.zero_point"),
            g_idx=tensors.get("weight.g_idx"),
            group_size=None if block is None else tuple(block),
        )
    if "experts" in attributes:
        return _operands_of_experts(attributes, tensors)
    return Operands(
        codes=tensors.get("codes"),
        packed=tensors.get("packed"),
        x=tensors.get("x"),
        h=tensors.get("h"),
        bias=tensors.get("bias"),
        size=attributes.get("size", 0),
        dim=attributes.get("dim", 1),
        weight=weight,
        dtype=DTYPES.get(attributes.get("dtype", "")),
        lora=_lora(attributes, tensors),
        adapter_ids=tensors.get("adapter_ids"),
        layout=_layout(entry["function"], tensors),
        zero_plus_one=attributes.get("zero_plus_one", True),
    )


def _operands_of_experts(attributes: dict[str, Any], tensors: dict[str, Tensor]) -> Operands:
    """Return the arguments of ``int4_moe``."""
    count, hidden, inter = (attributes[name] for name in ("experts", "hidden", "inter"))

    def weight(prefix: str, shape: tuple[int, int]) -> PackedWeight:
        fields = {
            name: tensors.get(f"{prefix}.{name}")
            for name in ("packed", "scale", "zero_point", "g_idx")
        }
        return PackedWeight(shape=shape, **fields)  # type: ignore[arg-type]

    def lora(layer: str, expert: int) -> LoRAStack | list[LoRASlice] | None:
        start = f"experts.{expert}.{layer}.lora."
        chosen = {
            f"lora.{name.removeprefix(start)}": tensor
            for name, tensor in tensors.items()
            if name.startswith(start)
        }
        starts = attributes.get("slices", {}).get(f"{expert}.{layer}")
        return _lora({} if starts is None else {"slices": starts}, chosen)

    layers = {layer: [lora(layer, expert) for expert in range(count)] for layer in LAYERS}
    given = {layer: entries if any(entries) else None for layer, entries in layers.items()}
    adapted = any(entries is not None for entries in given.values())
    return Operands(
        x=tensors["x"],
        experts=ExpertsWeight(
            gate_up=[weight(f"experts.{e}.gate_up", (2 * inter, hidden)) for e in range(count)],
            down=[weight(f"experts.{e}.down", (hidden, inter)) for e in range(count)],
        ),
        topk_ids=tensors["topk_ids"],
        topk_weights=tensors["topk_weights"],
        experts_lora=ExpertsLoRA(**given) if adapted else None,
        adapter_ids=tensors.get("adapter_ids"),
        activation=attributes["activation"],
        weights_first=attributes["weights_first"],
    )


def _layout(function: str, tensors: dict[str, Tensor]) -> GPTQTensors | AWQTensors | None:
    """Return the tensors of another layout, or None for a function that does not take them."""
    if function == "from_gptq":
        first = (tensors["qweight"], tensors["qzeros"], tensors["scales"])
        return GPTQTensors(*first, tensors.get("g_idx"))
    if function == "from_awq":
        return AWQTensors(tensors["qweight"], tensors["qzeros"], tensors["scales"])
    return None


def _lora(
    attributes: dict[str, Any], tensors: dict[str, Tensor]
) -> LoRAStack | list[LoRASlice] | None:
    if "lora.0.a" not in tensors:
        return None
    count = sum(name.endswith(".scaling") for name in tensors)
    stacks = [
        LoRAStack(*(tensors[f"lora.{index}.{part}"] for part in ("a", "b", "scaling")))
        for index in range(count)
    ]
    if "slices" not in attributes:
        return stacks[0]
    starts = attributes["slices"]
    return [LoRASlice(stack, start) for stack, start in zip(stacks, starts, strict=True)]


RESULT_DTYPES = {**DTYPES, "int8": torch.int8, "int32": torch.int32}
