"""Match modules to config groups, in the order in which compressed-tensors tries targets.

compressed-tensors' ``match_targets`` needs the model for the classes of modules; a checkpoint has
only their names.

Source: ``match_targets`` in ``compressed_tensors/utils/match.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["compile_targets", "group_of"]

CLASS_TARGETS = ("Linear", "Embedding")
EMBEDDING = re.compile(r"(.*\.)?(wte|wpe|\w*embed\w*)")  # the usual names of such modules


def compile_targets(
    file: Path, targets: Mapping[str, list[str]]
) -> list[tuple[str, re.Pattern[str]]]:
    """Return (group, pattern of a module's name) in the order in which to try them.

    As in compressed-tensors, exact names come first, then regular expressions in alphabetical
    order, then classes.

    Args:
        file: config.json, for the messages.
        targets: the targets of each config group.

    Raises:
        ValueError: a target after "re:" is not a regular expression.
    """
    by_kind: dict[str, list[tuple[str, str, re.Pattern[str]]]] = {"": [], "re:": [], "class": []}
    classes = {target for group_targets in targets.values() for target in group_targets} & {
        *CLASS_TARGETS
    }
    for name, group_targets in targets.items():
        for target in group_targets:
            if target.startswith("re:"):
                try:
                    pattern = re.compile(target.removeprefix("re:"))
                except re.error as error:
                    where = f"{file}: config_groups.{name}"
                    raise ValueError(f"{where}: target {target!r}: {error}") from error
                by_kind["re:"].append((target, name, pattern))
            elif target in CLASS_TARGETS:
                pattern = (
                    EMBEDDING if target == "Embedding" and len(classes) > 1 else re.compile("")
                )
                by_kind["class"].append((target, name, pattern))  # Embedding before Linear
            else:
                by_kind[""].append((target, name, re.compile(re.escape(target) + r"\Z")))
    ordered = [sorted(by_kind[kind], key=lambda entry: entry[0]) for kind in ("", "re:", "class")]
    return [(name, pattern) for kind in ordered for _, name, pattern in kind]


def group_of(file: Path, module: str, matches: Iterable[tuple[str, re.Pattern[str]]]) -> str:
    """Return the config group that targets a module.

    Raises:
        ValueError: no group targets it.
    """
    for name, pattern in matches:
        if pattern.match(module):
            return name
    raise ValueError(f"{file}: {module} is quantised, but no config group targets it")
