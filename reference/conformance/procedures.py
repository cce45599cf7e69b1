"""The ways in which a case is asked: one call, or several that must agree.

A procedure calls the backend, judges each result and yields it as ``Asked``. Where results of
several calls contradict each other, the finding is the procedure's.

Source: ``docs/conformance.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.reference import LoRAStack
from int4_lora.reference.conformance.backend import Backend, Prepared
from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.draws import Draws
from int4_lora.reference.conformance.cases.lora import mixed_ids
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.judging.check import (
    answer_on_cpu,
    check_call,
    one_thread,
)
from int4_lora.reference.conformance.judging.placement import not_contiguous, shared_memory
from int4_lora.reference.conformance.judging.systematic_error import systematic_error
from int4_lora.reference.conformance.judging.verdict import Finding
from int4_lora.reference.conformance.manifest import Manifest

__all__ = ["PROCEDURES", "Asked", "ask", "called", "judged"]

DRAWS = 16
REPEATS = 5


@dataclass(frozen=True, eq=False)
class Asked:
    """One call and the verdict on it.

    Args:
        operands: the arguments.
        result: what the backend returned.
        finding: what is wrong, or None.
        manifest: the roundings declared for the call.
        earlier_ids: the adapter ids of the case's previous call, or None.
        past_ids: the different adapter ids of the backend's earlier calls with as many tokens.
    """

    operands: Operands
    result: object
    finding: Finding | None
    manifest: Manifest
    earlier_ids: Tensor | None = None
    past_ids: tuple[Tensor, ...] = ()


def ask(case: Case, backend: Backend, seed: int, device: str) -> Iterator[Asked]:
    """Ask a backend one case; yield each call with its finding."""
    operands = case.operands(seed).to(device)
    yield from PROCEDURES[case.procedure](case, backend, operands, seed)


def called(
    case: Case,
    backend: Backend,
    operands: Operands,
    prepared: Prepared | None = None,
    earlier_ids: Tensor | None = None,
) -> Asked:
    """Call the backend once and judge the result."""
    prepared = prepared or backend.prepare(operands)
    past_ids = backend.past_ids(operands)
    result = backend.call(case.function, operands, prepared)
    manifest = backend.declared(operands, prepared)
    with one_thread():
        finding = shared_memory(result, operands) or judged(case, operands, result, manifest)
    if finding is None and manifest.contiguous:
        finding = not_contiguous(result)
    return Asked(operands, result, finding, manifest, earlier_ids, past_ids)


def judged(case: Case, operands: Operands, result: object, manifest: Manifest) -> Finding | None:
    """Return the finding against a result of a case, or None.

    Args:
        case: the case that was asked.
        operands: the arguments of the call.
        result: what the backend returned.
        manifest: the declared roundings.
    """
    if case.optional:
        return _sampled(case, operands, result, manifest)
    return check_call(case.function, operands, result, manifest, equal=case.equal)


def _sampled(case: Case, operands: Operands, result: object, manifest: Manifest) -> Finding | None:
    """Judge the first and last outputs of the first and last tokens of a large result."""
    if not isinstance(result, Tensor) or operands.x is None or operands.weight is None:
        return Finding("form", f"returned {type(result).__name__}, not a tensor")
    tokens, outputs = operands.x.shape[0], operands.weight.out_features
    chosen = torch.tensor(sorted({*range(min(tokens, 32)), *range(max(0, tokens - 32), tokens)}))
    for start in (0, outputs - 64):
        part = operands.with_outputs(start, start + 64).with_tokens(chosen)
        part_of_result = result[chosen.to(result.device), start : start + 64]
        finding = check_call(case.function, part, part_of_result, manifest)
        if finding is not None:
            return Finding(finding.rule, f"outputs from {start}: {finding.message}")
    return None


def _on_cpu(result: object) -> object:
    return result.detach().to("cpu") if isinstance(result, Tensor) else result


def _once(case: Case, backend: Backend, operands: Operands, seed: int) -> Iterator[Asked]:
    """Call once."""
    yield called(case, backend, operands)


def _alone(case: Case, backend: Backend, operands: Operands, seed: int) -> Iterator[Asked]:
    """Call with all tokens, then with each token alone."""
    prepared = backend.prepare(operands)
    yield called(case, backend, operands, prepared)
    earlier = None
    for token in range(_tokens(operands)):
        alone = operands.with_tokens(torch.tensor([token]))
        yield called(case, backend, alone, prepared, earlier)
        earlier = alone.adapter_ids


def _replayed(case: Case, backend: Backend, operands: Operands, seed: int) -> Iterator[Asked]:
    """Call repeatedly with the same buffers, changing their values and the adapters."""
    first, x, bias, lora = operands.adapter_ids, operands.x, operands.bias, operands.lora
    if first is None or x is None or bias is None or not isinstance(lora, LoRAStack):
        raise ValueError(f"{case.name}: a replay needs x, adapters, their ids and a bias")
    others = mixed_ids(Draws(seed, f"{case.name}/others"), len(first), 3).to(first)
    swapped = LoRAStack(lora.a.flip(0), lora.b.flip(0), lora.scaling.flip(0))
    prepared, earlier = backend.prepare(operands), None
    prepared_swapped = backend.with_adapters(prepared, dataclasses.replace(operands, lora=swapped))
    buffers = dataclasses.replace(
        operands, x=x.clone(), bias=bias.clone(), adapter_ids=first.clone()
    )
    rounds = ((first, 1), (others, 1), (first.flip(0), -1), (torch.full_like(first, -1), 1))
    for number, (chosen, sign) in enumerate((*rounds, (first, 1))):
        replayed = dataclasses.replace(buffers, lora=swapped if number % 2 else lora)
        values = (x.roll(number, 0) * sign, bias.roll(number), chosen)
        written = (replayed.x, replayed.bias, replayed.adapter_ids)
        for buffer, value in zip(written, values, strict=True):
            if buffer is not None:
                buffer.copy_(value)
        used = prepared_swapped if number % 2 else prepared
        asked = called(case, backend, replayed, used, earlier)
        copies = dataclasses.replace(
            replayed, x=values[0], bias=values[1], adapter_ids=chosen.clone()
        )
        yield dataclasses.replace(asked, operands=copies)
        earlier = chosen


def _kept(case: Case, backend: Backend, operands: Operands, seed: int) -> Iterator[Asked]:
    """Call three times, and check that the first result is unchanged."""
    prepared = backend.prepare(operands)
    first = called(case, backend, operands, prepared)
    yield first
    before = _on_cpu(first.result)
    before = before.clone() if isinstance(before, Tensor) else None
    for chosen in (torch.arange(3), torch.arange(_tokens(operands) - 1, -1, -1)):
        yield called(case, backend, operands.with_tokens(chosen), prepared)
    after = _on_cpu(first.result)
    if isinstance(before, Tensor) and isinstance(after, Tensor) and not torch.equal(before, after):
        finding = Finding(
            "kept", "a later call wrote over what this one had returned", before != after
        )
        yield dataclasses.replace(first, finding=finding)


def _resized(case: Case, backend: Backend, operands: Operands, seed: int) -> Iterator[Asked]:
    """Call with fewer tokens and more again, with the same prepared operands."""
    prepared, count = backend.prepare(operands), _tokens(operands)
    for tokens in (count, 3, 1, count, count // 2, count):
        yield called(case, backend, operands.with_tokens(torch.arange(tokens)), prepared)


def _repeated(case: Case, backend: Backend, operands: Operands, seed: int) -> Iterator[Asked]:
    """Repeat a call, and check that the bits are the same."""
    prepared = backend.prepare(operands)
    first = called(case, backend, operands, prepared)
    yield first
    before = first.result.clone() if isinstance(first.result, Tensor) else None
    for _ in range(REPEATS - 1):
        again = called(case, backend, operands, prepared)
        if isinstance(again.result, Tensor) and before is not None:
            wrong = again.result != before
            if again.finding is None and bool(wrong.any()):
                finding = Finding(
                    "repeat",
                    f"{int(wrong.sum())} of {wrong.numel()} elements differ when the call is "
                    "repeated; claim deterministic=False if that is meant",
                    wrong,
                )
                again = dataclasses.replace(again, finding=finding)
        yield again


def _written(case: Case, backend: Backend, operands: Operands, seed: int) -> Iterator[Asked]:
    """Repeat a call, each time on other poisoned memory."""
    prepared = backend.prepare(operands)
    for _ in range(REPEATS):
        yield called(case, backend, operands, prepared)


def _many_draws(case: Case, backend: Backend, operands: Operands, seed: int) -> Iterator[Asked]:
    """Call with other numbers each time, and judge all errors together."""
    errors, exacts, bounds = [], [], []
    last = None
    for draw in range(DRAWS):
        if draw:
            operands = case.operands(seed * DRAWS + draw).to(operands.device)
        last = called(case, backend, operands)
        yield last
        if last.finding is not None or not isinstance(last.result, Tensor):
            return
        held = answer_on_cpu(case.function, operands, last.manifest)
        errors.append(last.result.detach().to("cpu").double() - held.exact)
        exacts.append(held.exact)
        bounds.append(held.bound)
    finding = systematic_error(torch.stack(errors), torch.stack(exacts), torch.stack(bounds))
    if finding is not None and last is not None:
        yield dataclasses.replace(last, finding=finding)


def _tokens(operands: Operands) -> int:
    return 0 if operands.x is None else operands.x.shape[0]


PROCEDURES: dict[str, Callable[[Case, Backend, Operands, int], Iterator[Asked]]] = {
    "answer": _once,
    "alone": _alone,
    "replay": _replayed,
    "resized": _resized,
    "repeat": _repeated,
    "kept": _kept,
    "unmodified": _once,
    "written": _written,
    "many_draws": _many_draws,
}
