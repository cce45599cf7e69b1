"""The operator's options: ``additional_config={"int4_lora": {...}}``.

``additional_config`` enters vLLM's hash of the configuration, so that vLLM does not reuse a model
that it compiled with other options.

Source: ``docs/vllm.md``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["KEY", "Options", "read_options"]

KEY = "int4_lora"
CHOICES = {
    "backend": ("auto", "compiled", "stock-base"),
    "in_graph": ("custom-op", "inlined"),
    "favour": ("balanced", "decode", "prefill"),
}


@dataclass(frozen=True)
class Options:
    """The options of one engine.

    Args:
        backend: ``auto`` measures each layer shape at load and takes vLLM's own code for the base
            or the adapters where that is faster; ``compiled`` takes ours everywhere,
            ``stock-base`` vLLM's kernel for the base.
        in_graph: within vLLM's own torch.compile, ``custom-op`` chooses our compiled function by
            the number of tokens at run time, ``inlined`` makes the layer part of vLLM's graph.
        cache_bytes: the most bytes of dense weights that ``get_unpacked_weights`` keeps.
        warm_up: whether everything is compiled at load, so that no request waits for it.
        favour: the steps by whose times ``auto`` chooses: those that ``decode`` (up to 32 tokens),
            those that ``prefill`` (more), or ``balanced``, all.
    """

    backend: str = "auto"
    in_graph: str = "custom-op"
    cache_bytes: int = 0
    warm_up: bool = True
    favour: str = "balanced"


def read_options(additional_config: object) -> Options:
    """Read the options from vLLM's ``additional_config``.

    Args:
        additional_config: the whole of it; without the key ``int4_lora``, the defaults hold.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: an option does not exist, or a value is none of its choices.

    Example:
        >>> read_options({"int4_lora": {"backend": "compiled"}}).backend
        'compiled'
    """
    given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise TypeError(f"additional_config[{KEY!r}] must be a dict of options, got {kind}")
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    for name, value in given.items():
        if name not in defaults:
            raise ValueError(f"{KEY} has no option {name!r}{_hint(name, defaults)}")
        _check(name, value, defaults[name])
    return Options(**given)


def _check(name: str, value: object, default: object) -> None:
    if type(value) is not type(default):
        right, wrong = type(default).__name__, type(value).__name__
        raise TypeError(f"{KEY} option {name} must be {right}, got {wrong}")
    if name in CHOICES and value not in CHOICES[name]:
        choices = " or ".join(map(repr, CHOICES[name]))
        raise ValueError(f"{KEY} option {name} must be {choices}, got {value!r}")
    if name == "cache_bytes" and isinstance(value, int) and value < 0:
        raise ValueError(f"{KEY} option {name} must not be negative, got {value}")


def _hint(name: object, options: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), options, n=1)
    known = ", ".join(options)
    return f": did you mean {close[0]!r}?" if close else f"; there are {known}"
