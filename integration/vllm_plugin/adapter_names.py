"""What to log of an adapter whose modules match no layer of the model.

vLLM compares the last parts of the names only. A module with another prefix is loaded, matches no
layer, and the base model serves the request.

Source: https://github.com/vllm-project/vllm/issues/48019, ``LoRAModelManager.activate_adapter``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from int4_lora.integration.adapter.prefix_changes import fitting_renames, renamed

__all__ = ["unmatched_warning"]


def unmatched_warning(names: Sequence[str], known: Collection[str]) -> str | None:
    """Return what to log of an adapter, or None if every module matches a layer.

    Args:
        names: the adapter's modules, as vLLM calls them.
        known: the modules that the model's LoRA layers are made of.

    Example:
        >>> unmatched_warning(["a.layers.0.q"], {"b.layers.0.q"})
        "none of its 1 modules match a layer, so that the base model serves it; the first is \
a.layers.0.q; all would match if names that start with 'a.' started with 'b.'"
    """
    unmatched = [name for name in names if name not in known]
    if not unmatched:
        return None
    all_or_some = (
        f"none of its {len(names)} modules match a layer, so that the base model serves it; the "
        if len(unmatched) == len(names)
        else f"{len(unmatched)} of its {len(names)} modules match no layer and are left out; the "
    )
    changes = fitting_renames(
        names,
        known,
        left=lambda rules: {name for name in names if renamed(name, rules) not in known},
    )
    suggestions = [
        " and ".join(f"names that start with {old!r} started with {new!r}" for old, new in rules)
        for rules in changes
    ]
    hint = f"; all would match if {', or '.join(suggestions)}" if suggestions else ""
    return f"{all_or_some}first is {unmatched[0]}{hint}"
