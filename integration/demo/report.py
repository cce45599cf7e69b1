"""What a demo run found, as a table or as JSON.

Source: the rules are those of ``findings``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from int4_lora.integration.demo.findings import FLOAT64_LIMIT, Comparison

__all__ = ["as_json", "print_comparison"]

MEBIBYTE = 2**20


def print_comparison(console: Console, found: Comparison) -> None:
    """Print one table for agreement, and one for bytes and time."""
    console.print(_agreement(found))
    console.print(
        f"{found.linears} quantised linears, {found.elements:,} outputs: the worst error is "
        f"{found.worst_of_bound:.3f} of error_bound (right up to 1); "
        f"{found.unbounded} have no bound"
    )
    console.print(_bytes_and_time(found))
    if found.served.engines:
        console.print(_served(found))
    if found.served.why_not is not None:
        console.print(f"not served through vLLM: {found.served.why_not}")
    verdict = "right: every rule holds" if found.right else "WRONG: a rule is broken"
    console.print(verdict, style="green" if found.right else "red")


def as_json(found: Comparison) -> dict[str, Any]:
    """Return everything the tables show, as plain numbers and strings."""
    plain: dict[str, Any] = {**vars(found)}
    rows = [{**vars(row), "allowed": row.allowed, "right": row.right} for row in found.rows]
    served = {**dataclasses.asdict(found.served), "right": found.served.right}
    parts = {"right": found.right, **plain, "rows": rows, "served": served}
    whole: dict[str, Any] = _without_nan(parts)
    return whole


def _without_nan(value: Any) -> Any:
    """Return ``value`` with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _agreement(found: Comparison) -> Table:
    table = Table(title="One mixed batch against transformers + PEFT, each row alone")
    table.add_column("row")
    table.add_column(f"float64 error\n(<= {FLOAT64_LIMIT:.0e})", justify="right")
    for title in ("reference", "HF + PEFT", "allowed"):
        table.add_column(f"{found.dtype} rms\n{title}", justify="right")
    table.add_column("")
    for row in found.rows:
        table.add_row(
            row.adapter,
            f"{row.float64_error:.1e}",
            f"{row.ours:.2e}",
            f"{row.theirs:.2e}",
            f"{row.allowed:.2e}",
            "right" if row.right else "[red]WRONG[/red]",
        )
    return table


def _served(found: Comparison) -> Table:
    table = Table(
        title="The same batch served by vLLM, one engine after the other",
        caption="vLLM's own are not judged: up to 0.32 its CPU kernels give base rows an adapter",
    )
    table.add_column("")
    engines = found.served.engines
    for engine in engines:
        table.add_column(engine.name, justify="right")
    for number, row in enumerate(found.rows):
        errors = [engine.errors[number] for engine in engines]
        table.add_row(
            f"{row.adapter}: error, nats (<= {found.served.allowed:.3f})",
            *(_judged(error, found.served.allowed) for error in errors),
        )
    table.add_row("tokens/s, all rows", *(f"{one.tokens_per_second:.1f}" for one in engines))
    firsts = (f"{1e3 * one.first_token_seconds:.1f} ms" for one in engines)
    table.add_row("time to first token", *firsts)
    table.add_row(
        "peak memory, KV cache included", *(_mebibytes(one.peak_bytes) for one in engines)
    )
    return table


def _judged(error: float, allowed: float) -> str:
    return f"{error:.3f}" if error <= allowed else f"[red]{error:.3f} WRONG[/red]"


def _mebibytes(number: int | None) -> str:
    return "unknown" if number is None else f"{number / MEBIBYTE:.0f} MiB"


def _bytes_and_time(found: Comparison) -> Table:
    table = Table(title="Bytes and time: the reference is not made to be fast")
    table.add_column("")
    for title in ("reference\nINT4", f"HF + PEFT\n{found.dtype}", "ratio"):
        table.add_column(title, justify="right")
    table.add_row(
        "quantised weights",
        f"{found.packed_bytes / MEBIBYTE:.2f} MiB",
        f"{found.dense_bytes / MEBIBYTE:.2f} MiB",
        f"{found.dense_bytes / found.packed_bytes:.2f}x smaller",
    )
    table.add_row("adapters", f"{found.adapter_bytes / MEBIBYTE:.2f} MiB", "the same", "")
    table.add_row(
        "forward, all rows",
        f"{found.our_seconds:.2f} s",
        f"{found.their_seconds:.2f} s",
        f"{found.our_seconds / found.their_seconds:.2f}x the time",
    )
    return table
