"""Rename modules by their prefix, and find the changes of prefix after which all of them fit.

A module is ``prefix + layer + rest``, such as ``model.`` + ``layers.0.`` + ``self_attn.q_proj``. A
prefix has no numbers: a change of prefix leaves the layer and the expert what they are. A name
without a layer, such as ``lm_head``, may change as a whole.

Source: ``WeightRenaming`` in ``transformers/core_model_loading.py``, which renames by rules too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["Rename", "fitting_renames", "renamed", "shown"]

Rename = tuple[str, str]
"""OLD and NEW: a name that starts with OLD starts with NEW instead."""

MOST_RULES = 2  # that a suggestion consists of: one for the layers, one for the head


def renamed(name: str, rules: Iterable[Rename]) -> str:
    """Return a name after the first rule that applies to it.

    Example:
        >>> renamed("model.layers.0.mlp.up_proj", [("model.", "language_model.model.")])
        'language_model.model.layers.0.mlp.up_proj'
    """
    for old, new in rules:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def shown(rules: Iterable[Rename]) -> str:
    """Return rules as options of the command line.

    A rule that begins with ``=`` is quoted: zsh takes ``=NAME`` for the path of a command.

    Example:
        >>> shown([("model.", "model.language_model.")])
        '--rename model.=model.language_model.'
        >>> print(shown([("", "model.")]))
        --rename '=model.'
    """
    return " ".join(f"--rename {old}={new}" if old else f"--rename '={new}'" for old, new in rules)


def fitting_renames(
    names: Sequence[str],
    places: Iterable[str],
    left: Callable[[Sequence[Rename]], set[str]],
    forms: Callable[[str], Iterable[str]] = lambda name: (),
) -> list[tuple[Rename, ...]]:
    """Return every change of prefix after which all modules fit; if none, every pair of changes.

    Changes that give all modules the same names count once.

    Args:
        names: the modules' names.
        places: the names in the base.
        left: takes rules and returns the modules that do not fit after them.
        forms: returns the other names that a module may have in the base, such as that of the
            fused weight that it is a part of.
    """
    places = list(places)
    tried: list[tuple[Rename, ...]] = [()]
    for _ in range(MOST_RULES):
        fitting: dict[tuple[str, ...], tuple[Rename, ...]] = {}
        partial = []
        for rules in tried:
            remaining = left(rules)
            first = next((name for name in names if name in remaining), None)
            for rule in () if first is None else _candidates(first, places, forms):
                longer = (*rules, rule)
                still = left(longer)
                if any(renamed(name, longer) != renamed(name, rules) for name in still):
                    continue  # it moves a module to where it does not fit
                if still:
                    partial.append(longer)
                else:
                    fitting.setdefault(tuple(renamed(name, longer) for name in names), longer)
        if fitting:
            return list(fitting.values())
        tried = partial
    return []


def _candidates(
    name: str, places: Iterable[str], forms: Callable[[str], Iterable[str]]
) -> list[Rename]:
    """Return the changes of prefix that take a module to a place; those that say least first."""
    candidates: dict[Rename, None] = {}
    for form in (name, *forms(name)):
        parts = form.split(".")
        head = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        tail = ".".join(parts[head:])
        for place in places:
            if place == tail or place.endswith(f".{tail}"):
                candidates |= dict.fromkeys(_changes(parts, head, place.split(".")))
                if form == tail:  # such as lm_head, which has no layer
                    candidates[form, place] = None
    return sorted(candidates, key=lambda rule: (not all(rule), len(rule[0]), rule))


def _changes(parts: Sequence[str], head: int, place: Sequence[str]) -> Iterator[Rename]:
    """Yield the changes of ``parts[:kept]`` that turn a name into a place, for every ``kept``.

    Args:
        parts: the name's parts.
        head: how many of them a prefix may have.
        place: the parts of the place, which ends as the name does from ``head`` on.
    """
    shorter = len(parts) - len(place)
    for kept in range(head + 1):
        new = place[: max(kept - shorter, 0)]
        same_end = kept >= shorter and list(parts[kept:]) == list(place[kept - shorter :])
        if same_end and not any(part.isdigit() for part in new) and list(parts[:kept]) != new:
            yield _prefix(parts[:kept]), _prefix(new)


def _prefix(parts: Sequence[str]) -> str:
    return "".join(f"{part}." for part in parts)
