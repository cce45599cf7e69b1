"""Stack several adapters layer by layer, and check that they fit a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from int4_lora.integration.adapter.adapter import Adapter, AdapterModule
from int4_lora.integration.adapter.base_weights import BaseWeights
from int4_lora.integration.adapter.fitting import misfit
from int4_lora.integration.adapter.fused_forms import other_forms
from int4_lora.integration.adapter.shapes import check_shape
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.spellings import spellings
from int4_lora.reference import LoRAStack

__all__ = ["check_fits", "stack_adapters"]


def stack_adapters(
    adapters: Sequence[Adapter], name: str, in_features: int, out_features: int
) -> LoRAStack | None:
    """Stack the matrices of several adapters for one layer; an id is a position in ``adapters``.

    An adapter that does not target the layer adds zero. Adapters of different dtypes are widened
    to the smallest dtype that represents all of them exactly.

    Args:
        adapters: the adapters.
        name: the layer's name in the base model.
        in_features: columns of the layer's weight.
        out_features: rows of the layer's weight.

    Returns:
        The stack, or None if no adapter targets the layer.

    Raises:
        ValueError: an adapter's shapes do not fit the layer; the message names both. Or an adapter
            has the layer under another of transformers' names, fused, or split, or replaces its
            weight.

    Example:
        >>> stack = stack_adapters(
        ...     [read_adapter("sql-lora")], "model.layers.0.self_attn.q_proj", 4096, 4096
        ... )  # doctest: +SKIP

    Source:
        https://github.com/vllm-project/vllm/issues/48019 for what is refused.
    """
    for adapter in adapters:
        _refuse_another_name(adapter, name)
        replacement = adapter.replacements.get(f"{name}.weight")
        if replacement is not None:
            what = replacement.describe(f"{name}.weight")
            raise ValueError(f"{adapter.path}: {what}, which only merge applies")
    present = [adapter.modules[name] for adapter in adapters if name in adapter.modules]
    if not present:
        return None
    dtype = present[0].a.dtype
    for module in present:
        dtype = torch.promote_types(dtype, module.a.dtype)
    none = AdapterModule(
        torch.zeros(1, in_features, dtype=dtype), torch.zeros(out_features, 1, dtype=dtype), 0.0
    )
    stacked = []
    for adapter in adapters:
        if name in adapter.modules:
            check_shape(adapter, name, out_features, in_features)
        module = adapter.modules.get(name, none)
        stacked.append((module.a.to(dtype), module.b.to(dtype), module.scaling))
    return LoRAStack.stack(stacked)


def check_fits(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Check that every layer an adapter targets is a packed module of matching shape.

    Args:
        adapter: an adapter.
        checkpoint: the base model.

    Raises:
        ValueError: a layer is not packed in the base, or has another shape there, or the adapter
            replaces a tensor. Where the base lacks a layer, the message says which change of prefix
            would make every layer fit.

    Example:
        >>> adapter = fit_adapter(read_adapter("sql-lora"), checkpoint)  # doctest: +SKIP
        >>> check_fits(adapter, checkpoint)  # doctest: +SKIP

    Source:
        ``docs/commands/inspect.md``.
    """
    base = BaseWeights(checkpoint)
    quantised = {name for name in checkpoint.modules() if checkpoint.is_packed(name)}
    for name in adapter.modules:
        if name in checkpoint.schemes and name not in quantised:
            form = checkpoint.schemes[name].format
            raise ValueError(
                f"{adapter.path}: {name} is no INT4 module of {checkpoint.path}: it is {form}"
            )
        if name not in quantised and name in base.names:
            raise ValueError(
                f"{adapter.path}: {name} is not packed in INT4 in {checkpoint.path}, and adapters "
                "on other layers are not computed here; merge adds them"
            )
        if name not in quantised:
            raise ValueError(misfit(adapter, checkpoint))
        check_shape(adapter, name, *checkpoint.shape_of(name))
    for name, replacement in adapter.replacements.items():
        what = f"{adapter.path}: {replacement.describe(name)}, which only merge applies"
        ignored = "; merge and inspect ignore tensors that equal the base's"
        raise ValueError(what if replacement.rows is not None else what + ignored)


def _refuse_another_name(adapter: Adapter, name: str) -> None:
    """Refuse an adapter that has the layer ``name``, but not under this name.

    The layer would be computed without the adapter, and nothing would show it.
    """
    if name in adapter.modules:
        return
    for spelling in spellings(name):
        for other in (spelling, *other_forms(spelling)):
            if other in adapter.modules:
                raise ValueError(
                    f"{adapter.path}: {name} is {other} in the adapter: use fit_adapter, with "
                    "rename where prefixes differ"
                )
