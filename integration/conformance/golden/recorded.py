"""Results in files, written by a backend in any language.

Source: ``docs/golden-format.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from int4_lora.integration.conformance.golden.write import exportable, file_name
from int4_lora.reference.conformance import Case, Manifest, Outcome
from int4_lora.reference.conformance.diagnosis.search import Diagnostician
from int4_lora.reference.conformance.evidence import Witness
from int4_lora.reference.conformance.procedures import Asked, judged
from int4_lora.reference.conformance.run import failed

__all__ = ["RESULT", "read_manifest", "read_result", "run_recorded"]

RESULT = "result"
NEEDS_CALLS = "needs a backend that can be called"
NO_FILE = "no result file"


def read_manifest(folder: Path) -> Manifest:
    """Return the claims in ``manifest.json``; without the file, the defaults.

    Raises:
        ValueError: the file is no JSON object, or one of its claims is not valid.
    """
    file = folder / "manifest.json"
    if not file.exists():
        return Manifest()
    try:
        return Manifest.of(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def read_result(file: Path) -> Tensor:
    """Return the tensor "result" of a file.

    Raises:
        ValueError: the file is no safetensors file, or has no such tensor.
    """
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    if RESULT not in tensors:
        raise ValueError(f"{file}: there is no tensor {RESULT!r}, only {sorted(tensors)}")
    return tensors[RESULT]


def run_recorded(
    folder: Path,
    cases: Sequence[Case],
    manifest: Manifest,
    seed: int = 0,
    *,
    evidence: bool = False,
) -> Iterator[Outcome]:
    """Judge the results in a folder; yield the outcome of each case.

    Args:
        folder: one safetensors file per case, named as in golden files.
        cases: what ``select`` returned.
        manifest: the backend's claims.
        seed: the seed of the golden files.
        evidence: whether outcomes keep their evidence.

    Raises:
        ValueError: there is no file for any case, or one cannot be read.
    """
    if not any((folder / file_name(case.name)).exists() for case in exportable(cases)):
        raise ValueError(f"{folder}: there is no result of any of the cases")
    diagnostician = Diagnostician()
    for case in cases:
        witness = Witness(case.function) if evidence and not case.optional else None
        outcome = _outcome(folder, case, manifest, seed, diagnostician, witness)
        yield outcome if witness is None else replace(outcome, evidence=witness.evidence())


def _outcome(
    folder: Path,
    case: Case,
    manifest: Manifest,
    seed: int,
    diagnostician: Diagnostician,
    witness: Witness | None,
) -> Outcome:
    passed = Outcome(case.name, case.exercises, "passed")
    file = folder / file_name(case.name)
    if not exportable([case]):
        return replace(passed, status="skipped", message=NEEDS_CALLS)
    operands = case.operands(seed)
    why = manifest.why_not(operands) or (None if file.exists() else NO_FILE)
    if why is not None:
        return replace(passed, status="skipped", message=why)
    result = read_result(file)
    finding = judged(case, operands, result, manifest)
    asked = Asked(operands, result, finding, manifest)
    if witness is not None:
        witness.see(asked)
    return passed if finding is None else failed(case, asked, diagnostician)
