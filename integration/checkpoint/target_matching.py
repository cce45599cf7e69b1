"""Match modules to config groups, in the order in which compressed-tensors tries targets.

compressed-tensors' ``match_targets`` needs the model for the classes of modules; a checkpoint has
only their names. compressed-tensors writes targets for the names in memory, which may differ from
those in the files.

Source: ``match_targets`` in ``compressed_tensors/utils/match.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from int4_lora.integration.checkpoint.spellings import spellings

__all__ = ["EMBEDDING", "Targets", "compile_targets", "group_of", "groups_by_name", "ignored"]

CLASS_TARGETS = ("Linear", "Embedding")
EMBEDDING = re.compile(r"(.*\.)?(wte|wpe|\w*embed\w*)")  # the usual names of such modules


class Targets(NamedTuple):
    """The targets of all groups, in the order to try them.

    Args:
        exact: the group of each name that is a target; a config may list thousands of experts.
        patterns: (group, regular expression), in alphabetical order of the expressions.
        classes: (group, pattern of the names) of classes of modules, which are guessed from names.
    """

    exact: Mapping[str, str]
    patterns: list[tuple[str, re.Pattern[str]]]
    classes: list[tuple[str, re.Pattern[str]]]

    def by_name(self, module: str) -> str | None:
        """Return the group of the first target that names a module."""
        if module in self.exact:
            return self.exact[module]
        return _first(module, self.patterns)


def compile_targets(file: Path, targets: Mapping[str, list[str]]) -> Targets:
    """Return the targets of all groups in the order in which compressed-tensors tries them.

    Args:
        file: config.json, for the messages.
        targets: the targets of each config group.

    Raises:
        ValueError: a target after "re:" is not a regular expression.
    """
    exact: dict[str, str] = {}
    by_kind: dict[str, list[tuple[str, str, re.Pattern[str]]]] = {"re:": [], "class": []}
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
                exact.setdefault(target, name)
    ordered = {
        kind: [(name, pattern) for _, name, pattern in sorted(entries, key=lambda entry: entry[0])]
        for kind, entries in by_kind.items()
    }
    return Targets(exact, ordered["re:"], ordered["class"])


def group_of(file: Path, module: str, targets: Targets) -> str:
    """Return the config group that targets a module.

    A module whose own name no target names is tried under its other spellings, before classes.

    Args:
        file: config.json, for the messages.
        module: the module's name in the files.
        targets: the targets of all groups.

    Raises:
        ValueError: no group targets the module, or its other spellings lead to different groups.
    """
    groups = groups_by_name(module, targets)
    if len(groups) > 1:
        shown = " and ".join(f"{name} in {group}" for group, name in groups.items())
        raise ValueError(f"{file}: {module}: its other spellings are in different groups: {shown}")
    group = next(iter(groups), None) or _first(module, targets.classes)
    if group is None:
        raise ValueError(f"{file}: {module} is quantised, but no config group targets it")
    return group


def groups_by_name(module: str, targets: Targets) -> dict[str, str]:
    """Return the groups of which a target names a module, and the spelling that it names.

    Args:
        module: the module's name in the files. If a target names it, its other spellings do not
            count.
        targets: the targets of all groups.
    """
    own = targets.by_name(module)
    if own is not None:
        return {own: module}
    others = spellings(module)[1:] if targets.exact or targets.patterns else ()
    named = {name: targets.by_name(name) for name in others}
    return {group: name for name, group in reversed(named.items()) if group is not None}


def ignored(file: Path, quantization: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Return the modules that the ignore list names, under any of their spellings.

    Args:
        file: config.json, for the messages.
        quantization: its part about the quantisation.
        modules: names of modules in the files.

    Raises:
        ValueError: the list is no list of names, or an entry is not a regular expression.
    """
    entries = quantization.get("ignore") or []
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{file}: ignore must be a list of names, got {entries!r}")
    patterns = []
    for entry in entries:
        text = entry.removeprefix("re:") if entry.startswith("re:") else re.escape(entry) + r"\Z"
        try:
            patterns.append(re.compile("" if entry == "Linear" else text))
        except re.error as error:
            raise ValueError(f"{file}: ignore: {entry!r}: {error}") from error
    return [
        module
        for module in modules
        if any(pattern.match(name) for pattern in patterns for name in spellings(module))
    ]


def _first(name: str, targets: Iterable[tuple[str, re.Pattern[str]]]) -> str | None:
    """Return the group of the first target that matches a name."""
    return next((group for group, pattern in targets if pattern.match(name)), None)
