"""Show the results of a demo run, as tables or as JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from int4_lora.integration.demo.findings import FLOAT64_LIMIT, Comparison

__all__ = ["as_json", "print_comparison"]

MEBIBYTE = 2**20


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print tables of agreement, of bytes and time, and of vLLM's engines if they ran."""
    console.print(_agreement(comparison))
    console.print(
        f"{comparison.linears} quantised linears, {comparison.elements:,} outputs: the largest "
        f"error is {comparison.worst_of_bound:.3f} of error_bound (at most 1 is right); "
        f"{comparison.unbounded} outputs have no bound"
    )
    if comparison.wrong_linear is not None:
        console.print(comparison.wrong_linear, style="red", markup=False)
    console.print(_bytes_and_time(comparison))
    if comparison.served.engines:
        console.print(_served(comparison))
    if comparison.served.why_not is not None:
        console.print(f"not served through vLLM: {comparison.served.why_not}", markup=False)
    verdict = "right: every rule holds" if comparison.right else "WRONG: a rule is broken"
    console.print(verdict, style="green" if comparison.right else "red")


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything that the tables show as plain numbers and strings."""
    rows = [{**vars(row), "allowed": row.allowed, "right": row.right} for row in comparison.rows]
    served = {**dataclasses.asdict(comparison.served), "right": comparison.served.right}
    members = {"right": comparison.right, **vars(comparison), "rows": rows, "served": served}
    plain: dict[str, Any] = _with_null(members)
    return plain


def _with_null(value: Any) -> Any:
    """Return ``value`` with null for every number that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _with_null(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_with_null(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _agreement(comparison: Comparison) -> Table:
    table = Table(title="One mixed batch against transformers + PEFT with each adapter alone")
    table.add_column("row")
    table.add_column(f"float64 error\n(<= {FLOAT64_LIMIT:.0e})", justify="right")
    for title in ("reference", "HF + PEFT", "allowed"):
        table.add_column(f"{comparison.dtype} rms\n{title}", justify="right")
    table.add_column("")
    for row in comparison.rows:
        table.add_row(
            row.adapter,
            f"{row.float64_error:.1e}",
            f"{row.ours:.2e}",
            f"{row.theirs:.2e}",
            f"{row.allowed:.2e}",
            "right" if row.right else "[red]WRONG[/red]",
        )
    return table


def _bytes_and_time(comparison: Comparison) -> Table:
    packed, dense = comparison.packed_bytes, comparison.dense_bytes
    ours, theirs = comparison.our_seconds, comparison.their_seconds
    table = Table(title="Bytes and time (the reference is not meant to be fast)")
    table.add_column("")
    for title in ("reference\nINT4", f"HF + PEFT\n{comparison.dtype}", "ratio"):
        table.add_column(title, justify="right")
    table.add_row(
        "quantised weights",
        f"{packed / MEBIBYTE:.2f} MiB",
        f"{dense / MEBIBYTE:.2f} MiB",
        f"{dense / packed:.2f}x smaller",
    )
    table.add_row("adapters", f"{comparison.adapter_bytes / MEBIBYTE:.2f} MiB", "the same", "")
    table.add_row(
        "forward, all rows", f"{ours:.2f} s", f"{theirs:.2f} s", f"{ours / theirs:.2f}x the time"
    )
    return table


def _served(comparison: Comparison) -> Table:
    table = Table(
        title="The same batch served by vLLM, one engine after the other",
        caption="vLLM's own are not judged: up to 0.32 its CPU kernels add an adapter to base rows",
    )
    table.add_column("")
    engines, allowed = comparison.served.engines, comparison.served.allowed
    for engine in engines:
        table.add_column(engine.name, justify="right")
    for number, row in enumerate(comparison.rows):
        errors = [engine.errors[number] for engine in engines]
        table.add_row(
            f"{row.adapter}: error, nats (<= {allowed:.3f})",
            *(_judged(error, allowed) for error in errors),
        )
    table.add_row("tokens/s, all rows", *(f"{engine.tokens_per_second:.1f}" for engine in engines))
    table.add_row(
        "time to first token",
        *(f"{1e3 * engine.first_token_seconds:.1f} ms" for engine in engines),
    )
    table.add_row(
        "peak memory, KV cache included", *(_mebibytes(engine.peak_bytes) for engine in engines)
    )
    return table


def _judged(error: float, allowed: float) -> str:
    return f"{error:.3f}" if error <= allowed else f"[red]{error:.3f} WRONG[/red]"


def _mebibytes(number: int | None) -> str:
    return "unknown" if number is None else f"{number / MEBIBYTE:.0f} MiB"
