"""Fit an adapter to a base whose modules have other names, or are fused or split.

Names are changed by rules that the caller gives, never by a guess; where a change of prefix would
make every module fit, the error message says which.

Source: ``docs/commands/merge.md``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from int4_lora.integration.adapter.adapter import Adapter, AdapterModule
from int4_lora.integration.adapter.base_weights import BaseWeights
from int4_lora.integration.adapter.fused_forms import (
    map_forms,
    other_forms,
    place,
    unfit_modules,
)
from int4_lora.integration.adapter.older_names import with_older_names
from int4_lora.integration.adapter.prefix_changes import (
    Rename,
    fitting_renames,
    renamed,
    shown,
)
from int4_lora.integration.adapter.shapes import check_shape
from int4_lora.integration.checkpoint.open import Checkpoint

__all__ = ["check_used", "fit_adapter", "misfit"]

Value = TypeVar("Value")


def fit_adapter(
    adapter: Adapter, checkpoint: Checkpoint, rename: Sequence[tuple[str, str]] = ()
) -> Adapter:
    """Return an adapter with its modules under the names and in the forms of a base.

    ``q_proj``, ``k_proj`` and ``v_proj`` of the adapter become one module where the base has
    ``qkv_proj``, and the reverse; so do ``gate_proj`` and ``up_proj``. Experts of Mixtral's family
    get their names in checkpoints. What is added to the weights stays the same.

    Args:
        adapter: an adapter.
        checkpoint: the base model.
        rename: pairs (OLD, NEW): a name that starts with OLD starts with NEW instead. The first
            pair that applies to a name is the only one.

    Returns:
        The adapter, whose ``notes`` say what was renamed and mapped.

    Raises:
        TypeError: ``rename`` is not of pairs of strings.
        ValueError: the base lacks a module, a form does not add up, or two modules would have one
            name. Where modules are missing, the message names the first, and the changes of prefix
            after which every module fits, if there are any.

    Example:
        >>> adapter = read_adapter("text-lora")  # doctest: +SKIP
        >>> base = open_checkpoint("my-vlm-W4A16")  # doctest: +SKIP
        >>> rename = [("model.", "model.language_model.")]
        >>> adapter = fit_adapter(adapter, base, rename)  # doctest: +SKIP

    Source:
        ``docs/commands/merge.md``.
    """
    rename = _pairs(rename)
    base = BaseWeights(checkpoint)
    named = _renamed(adapter, adapter.modules, rename)
    try:
        modules, older = with_older_names(named, base.names)
    except ValueError as error:
        raise ValueError(f"{adapter.path}: {error}") from error
    replacements = _renamed(adapter, adapter.replacements, rename)
    placement = place(modules, base)
    if placement.unplaced or not all(_has_tensor(base, name) for name in replacements):
        _check_first_shapes(adapter, modules, base)
        raise ValueError(_misfit(adapter, base, rename))
    try:
        mapped, notes = map_forms(placement, base)
    except ValueError as error:
        raise ValueError(f"{adapter.path}: {error}") from error
    return dataclasses.replace(
        adapter,
        modules=mapped,
        replacements=replacements,
        notes=(*adapter.notes, *_rename_notes(adapter, rename), *older, *notes),
    )


def _check_first_shapes(
    adapter: Adapter, modules: Mapping[str, AdapterModule], base: BaseWeights
) -> None:
    """Check the shapes of the modules up to the first that the base lacks."""
    first = next((name for name in modules if name not in base.names), None)
    for name in itertools.takewhile(lambda name: name != first, modules):
        shape = base.shape(name)
        if shape is not None and len(shape) == 2:
            check_shape(dataclasses.replace(adapter, modules=modules), name, *shape)


def misfit(adapter: Adapter, checkpoint: Checkpoint, rename: Sequence[Rename] = ()) -> str:
    """Return which module of an adapter a base lacks, and what would make all of them fit.

    Args:
        adapter: an adapter of which the base lacks a module.
        checkpoint: the base model.
        rename: the rules that were applied.
    """
    return _misfit(adapter, BaseWeights(checkpoint), rename)


def _misfit(adapter: Adapter, base: BaseWeights, rename: Sequence[Rename]) -> str:
    """Return what ``misfit`` returns."""
    unplaced = {*place(_renamed(adapter, adapter.modules, rename), base).unplaced}
    lacking = [name for name in adapter.modules if renamed(name, rename) in unplaced]
    lacking += [
        name for name in adapter.replacements if not _has_tensor(base, renamed(name, rename))
    ]
    if not lacking:
        return f"{adapter.path}: fit_adapter brings its split or fused modules into the base's form"
    name = renamed(lacking[0], rename)
    was = f" (renamed from {lacking[0]})" if name != lacking[0] else ""
    message = f"{adapter.path}: {name}{was} is no module of {base.checkpoint.path}"
    names = [*adapter.modules, *adapter.replacements]
    suggestions = fitting_renames(
        names,
        base.names,
        left=lambda rules: _unfit(adapter, base, rules),
        forms=lambda name: (
            other_forms(name) if name in adapter.modules else (name.rpartition(".")[0],)
        ),
    )
    if not suggestions:
        return message
    options = " or ".join(map(shown, suggestions))
    instead = f", instead of {shown(rename)}" if rename else ""
    choice = ", and names and shapes do not tell which is right" if len(suggestions) > 1 else ""
    all_names = f"all {len(names)}" if len(names) > 1 else "it"
    return f"{message}; {all_names} would fit with {options}{instead}{choice}"


def check_used(rename: Sequence[Rename], adapters: Iterable[Adapter]) -> None:
    """Check that every rule applies to a name of one of the adapters.

    Args:
        rename: pairs (OLD, NEW), as in ``fit_adapter``.
        adapters: adapters as they were read.

    Raises:
        TypeError: ``rename`` is not of pairs of strings.
        ValueError: a rule applies to none.
    """
    rename = _pairs(rename)
    names = [name for adapter in adapters for name in (*adapter.modules, *adapter.replacements)]
    used = {_rule_of(name, rename) for name in names}
    for rule in rename:
        if rule not in used:
            raise ValueError(f"{shown([rule])} applies to no name of the adapters")


def _pairs(rename: Sequence[tuple[str, str]]) -> list[Rename]:
    """Return rules as pairs, checked.

    Raises:
        TypeError: one of them is not a pair of strings.
    """
    pairs = []
    for rule in rename:
        pair: tuple[object, ...] = tuple(rule) if isinstance(rule, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(prefix, str) for prefix in pair):
            raise TypeError(f"rename must be pairs (OLD, NEW) of strings, got {rule!r}")
        pairs.append((str(pair[0]), str(pair[1])))
    return pairs


def _renamed(
    adapter: Adapter, values: Mapping[str, Value], rules: Sequence[Rename]
) -> dict[str, Value]:
    """Return values by their names after the rules."""
    first: dict[str, str] = {}
    for name in values:
        other = first.setdefault(renamed(name, rules), name)
        if other != name:
            raise ValueError(
                f"{adapter.path}: {other} and {name} would both be {renamed(name, rules)} with "
                f"{shown(rules)}"
            )
    return {renamed(name, rules): value for name, value in values.items()}


def _rule_of(name: str, rules: Iterable[Rename]) -> Rename | None:
    return next((rule for rule in rules if name.startswith(rule[0])), None)


def _rename_notes(adapter: Adapter, rules: Sequence[Rename]) -> list[str]:
    """Return what each rule renamed."""
    names = (*adapter.modules, *adapter.replacements)
    counts = Counter(_rule_of(name, rules) for name in names)
    return [f"{shown([rule])} applied (x{counts[rule]})" for rule in rules if counts[rule] > 0]


def _has_tensor(base: BaseWeights, name: str) -> bool:
    """Return whether a base has the tensor ``name``, packed or not."""
    return name in base.checkpoint.tensors or name.rpartition(".")[0] in base.names


def _unfit(adapter: Adapter, base: BaseWeights, rules: Sequence[Rename]) -> set[str]:
    """Return the names of modules and tensors that do not fit a base after the rules."""
    try:
        modules = _renamed(adapter, adapter.modules, rules)
        tensors = _renamed(adapter, adapter.replacements, rules)
    except ValueError:  # two would have one name
        return {*adapter.modules, *adapter.replacements}
    unfit = unfit_modules(modules, base)
    unfit |= {name for name in tensors if not _has_tensor(base, name)}
    names = (*adapter.modules, *adapter.replacements)
    return {name for name in names if renamed(name, rules) in unfit}
