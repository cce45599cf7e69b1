"""Read how each module is quantised from the ``quantization_config`` of GPTQ and AWQ.

A config describes all modules alike; which ones are quantised shows in the tensors. GPTQModel's
``dynamic`` changes fields for some modules.

Source: ``QuantizeConfig`` of AutoGPTQ 0.7 and GPTQModel 5; ``AwqConfig`` of transformers;
``quant_config`` of AutoAWQ 0.2; ``AWQConfig`` of GPTQModel 7, whose symmetric weights
(``zero_point`` false) store zero-points of 8.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from int4_lora.integration.checkpoint.layouts import AWQ, GPTQ, GPTQ_V2
from int4_lora.integration.checkpoint.scheme import Scheme

__all__ = ["OTHER_SCHEMES"]

Read = Callable[[Path, Mapping[str, Any], Iterable[str]], dict[str, Scheme]]
PACKED_FOR_A_KERNEL = "only the layouts that all tools read are read, not those packed for a kernel"


def _read_gptq(
    file: Path, quantization: Mapping[str, Any], modules: Iterable[str]
) -> dict[str, Scheme]:
    """Return the scheme of each module of a GPTQ checkpoint.

    Args:
        file: config.json, for the messages.
        quantization: its part about the quantisation.
        modules: the names of the quantised modules.

    Raises:
        ValueError: a field has a value that is not read; the message names the field.
    """
    dynamic = quantization.get("dynamic") or {}
    rules = _read_rules(file, dynamic)
    plain = _gptq_scheme(str(file), quantization)
    schemes = {}
    for module in modules:
        pattern = next((rule for rule, regex in rules.items() if regex.match(module)), None)
        if pattern is None:
            schemes[module] = plain
        elif pattern.startswith("-:"):
            raise ValueError(f"{file}: {module} is quantised, but dynamic excludes it: {pattern!r}")
        else:
            where = f"{file}: dynamic {pattern!r}"
            schemes[module] = _gptq_scheme(where, {**quantization, **dynamic[pattern]})
    return schemes


def _read_rules(file: Path, dynamic: object) -> dict[str, re.Pattern[str]]:
    """Return the regular expression of each rule of ``dynamic``, in order."""
    if not isinstance(dynamic, dict) or not all(
        isinstance(change, dict) for change in dynamic.values()
    ):
        raise ValueError(f"{file}: dynamic must map patterns to objects, got {dynamic!r}")
    try:
        return {rule: re.compile(re.sub(r"^[+-]:", "", rule)) for rule in dynamic}
    except re.error as error:
        raise ValueError(f"{file}: dynamic: {error.pattern!r}: {error}") from error


def _gptq_scheme(where: str, fields: Mapping[str, Any]) -> Scheme:
    named = [fields[key] for key in ("checkpoint_format", "format") if fields.get(key) is not None]
    form = named[0] if named else GPTQ
    if form not in (GPTQ, GPTQ_V2) or any(other != form for other in named):
        raise ValueError(
            f"{where}: checkpoint_format must be {GPTQ!r} or {GPTQ_V2!r}, got "
            f"{' and '.join(map(repr, named))}: {PACKED_FOR_A_KERNEL}"
        )
    if fields.get("is_marlin_format"):
        raise ValueError(f"{where}: is_marlin_format must be false: {PACKED_FOR_A_KERNEL}")
    if fields.get("pack_dtype", "int32") not in ("int32", None):
        raise ValueError(f"{where}: pack_dtype must be 'int32', got {fields['pack_dtype']!r}")
    bits = fields.get("bits")
    if type(bits) is not int or bits not in (4, 8):
        raise ValueError(f"{where}: bits must be 4 or 8 to be read, got {bits!r}")
    strategy, size = _read_group_size(where, fields.get("group_size", 128))
    by_activation = _read_bool(where, fields, "desc_act", default=False)
    return Scheme(
        format=form,
        kind="int",
        bits=bits,
        symmetric=_read_bool(where, fields, "sym", default=True),
        strategy=strategy,
        group_size=size,
        actorder="group" if by_activation else None,
        activations=False,
    )


def _read_awq(
    file: Path, quantization: Mapping[str, Any], modules: Iterable[str]
) -> dict[str, Scheme]:
    """Return the scheme of each module of an AWQ checkpoint; as ``_read_gptq``."""
    named = [
        quantization[key]
        for key in ("version", "checkpoint_format", "format")
        if quantization.get(key) is not None
    ]
    if any(not isinstance(version, str) or version.lower() != "gemm" for version in named):
        shown = " and ".join(map(repr, named))
        raise ValueError(f"{file}: version must be 'gemm', got {shown}: {PACKED_FOR_A_KERNEL}")
    if quantization.get("backend") == "llm-awq":
        raise ValueError(f"{file}: backend 'llm-awq' packs weights in another layout than 'gemm'")
    bits = _one_of(quantization, "bits", "w_bit", default=4)
    if bits != 4 or type(bits) is not int:
        raise ValueError(f"{file}: bits must be 4, got {bits!r}")
    size = _one_of(quantization, "group_size", "q_group_size", default=128)
    strategy, group_size = _read_group_size(str(file), size)
    scheme = Scheme(
        format=AWQ,
        kind="int",
        bits=4,
        symmetric=not _read_bool(str(file), quantization, "zero_point", default=True),
        strategy=strategy,
        group_size=group_size,
        actorder=None,
        activations=False,
    )
    return dict.fromkeys(modules, scheme)


def _read_group_size(where: str, size: object) -> tuple[str, int | None]:
    """Return the strategy and the number of columns in a group; -1 is one group for the row."""
    if type(size) is not int or (size < 1 and size != -1):
        raise ValueError(f"{where}: group_size must be a positive whole number or -1, got {size!r}")
    return ("channel", None) if size == -1 else ("group", size)


def _read_bool(where: str, fields: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = fields.get(name)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{where}: {name} must be true or false, got {value!r}")
    return default if value is None else bool(value)


def _one_of(fields: Mapping[str, Any], name: str, older_name: str, *, default: object) -> object:
    """Return a field that older files have under another name."""
    for key in (name, older_name):
        if fields.get(key) is not None:
            return fields[key]
    return default


OTHER_SCHEMES: dict[str, Read] = {"gptq": _read_gptq, "awq": _read_awq}
"""What reads the schemes of each method but compressed-tensors."""
