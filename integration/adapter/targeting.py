"""Decide which layers an adapter's config targets, as PEFT decides it.

With ``layers_to_transform``, PEFT takes one number of a layer's name for the layer's number. A name
in a mixture of experts has two: PEFT 0.20 and newer take the first (the layer's), older ones the
last (the expert's). An adapter holds the matrices of the layers that its own PEFT targeted.

Source: ``check_target_module_exists`` in ``peft/tuners/tuners_utils.py``, PEFT 0.18 to 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "ALL_LINEAR",
    "COUNTINGS",
    "NEWEST",
    "SAVED",
    "Counting",
    "check_targeted",
    "countings",
    "is_targeted",
]

ALL_LINEAR = "all-linear"
SAVED = r"(^|.*\.){}($|\..*)"  # PEFT inserts each of modules_to_save at {}
VERSION = re.compile(r"(\d+)\.(\d+)(\.\d+)*")  # no development version


@dataclass(frozen=True)
class Counting:
    """How one range of PEFT's versions finds a layer's number in its name.

    Args:
        versions: the range, for messages.
        any_pattern: the regular expression without ``layers_pattern``.
        pattern: the regular expression with ``layers_pattern``, which stands at {}.
    """

    versions: str
    any_pattern: str
    pattern: str

    def number(self, config: Mapping[str, Any], name: str) -> int | None:
        """Return the number of the layer ``name``, or None if its name has none."""
        patterns = config.get("layers_pattern") or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        regexes = [self.pattern.format(pattern) for pattern in patterns] or [self.any_pattern]
        match = next(filter(None, (re.match(regex, name) for regex in regexes)), None)
        if match is None:
            return None
        # A group in layers_pattern comes before the unnamed group of the number.
        number = match["idx"] if "idx" in match.re.groupindex else match[1]
        return int(number) if number.isdigit() else None


NEWEST = Counting("0.21 and newer", r".*?\.[^.]*\.(?P<idx>\d+)\.", r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")
COUNTINGS = (
    NEWEST,
    Counting("0.20", r".*?\.[^.]*\.(\d+)\.", r".*?\.{}\.(\d+)\."),
    Counting("before 0.20", r".*\.[^.]*\.(\d+)\.", r".*\.{}\.(\d+)\."),
)
SINCE = ((0, 21), (0, 20), (0, 0))


def countings(config: Mapping[str, Any]) -> Sequence[Counting]:
    """Return how the PEFT that saved a config may have counted layers, the newest first.

    PEFT 0.18 and newer record their version. Without it, or with that of a development version,
    each way is possible.

    Args:
        config: the content of adapter_config.json.

    Example:
        >>> [counting.versions for counting in countings({"peft_version": "0.20.1"})]
        ['0.20']
    """
    version = VERSION.fullmatch(str(config.get("peft_version")))
    if version is None:
        return COUNTINGS
    number = (int(version[1]), int(version[2]))
    return [next(way for way, since in zip(COUNTINGS, SINCE, strict=True) if number >= since)]


def is_targeted(config: Mapping[str, Any], name: str, counting: Counting = NEWEST) -> bool:
    """Return whether PEFT applies an adapter with this config to the layer ``name``.

    Args:
        config: the content of adapter_config.json.
        name: the layer's name in PEFT.
        counting: how ``layers_to_transform`` counts layers.

    Example:
        >>> config = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
        >>> [is_targeted(config, f"model.layers.{layer}.self_attn.q_proj") for layer in (0, 1)]
        [False, True]
    """
    if _names(config.get("exclude_modules"), name):
        return False
    if any(re.match(SAVED.format(saved), name) for saved in config.get("modules_to_save") or ()):
        return False
    targets = config.get("target_modules")
    if targets is None and config.get("target_parameters") is not None:
        return False
    if targets is not None and targets != ALL_LINEAR and not _names(targets, name):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or (isinstance(targets, list) and name in targets):
        return True
    return counting.number(config, name) in ([layers] if isinstance(layers, int) else layers)


def check_targeted(
    file: Path, config: Mapping[str, Any], modules: Sequence[tuple[str, ...]]
) -> list[str]:
    """Check that PEFT, as it was when it saved a config, targets every module of an adapter.

    Args:
        file: adapter_config.json, for the message.
        config: its content.
        modules: the names that each module has in PEFT, of which one must be targeted.

    Returns:
        A note, if the newest PEFT would not target all of them.

    Raises:
        ValueError: no version that may have saved the config targets all; the message names the
            module and, with ``layers_to_transform``, its number in each version.
    """

    def missed(counting: Counting) -> list[tuple[str, ...]]:
        return [
            names
            for names in modules
            if not any(is_targeted(config, name, counting) for name in names)
        ]

    possible = countings(config)
    fitting = next((counting for counting in possible if not missed(counting)), None)
    if fitting is None:
        name = missed(possible[0])[0][0]
        raise ValueError(
            f"{file}: {name} is stored, but the config does not target it, so that PEFT would "
            f"ignore it{_numbers(config, name)}"
        )
    ignored = len(missed(NEWEST))
    if not ignored:
        return []
    return [
        f"layers_to_transform counts layers as PEFT {fitting.versions} does; PEFT "
        f"{NEWEST.versions} would ignore {ignored} of the adapter's {len(modules)} modules"
    ]


def _numbers(config: Mapping[str, Any], name: str) -> str:
    """Return what each version of PEFT takes for the layer's number in ``name``."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return ""
    listed = ", ".join(f"{way.number(config, name)} (PEFT {way.versions})" for way in COUNTINGS)
    return (
        f"; layers_to_transform is {layers}, peft_version {config.get('peft_version')!r}, and the "
        f"layer's number is {listed}"
    )


def _names(targets: Any, name: str) -> bool:
    """Return whether ``targets``, a regular expression or a list of endings, matches ``name``."""
    if not targets:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    parts = name.split(".")
    endings = {".".join(parts[start:]) for start in range(len(parts))}
    return not endings.isdisjoint(targets)  # an adapter may list thousands of experts
