"""The steps by which one adapter changes the weights of a base.

PEFT applies what it trained to the module that it trained. If the base ties the head to the
embeddings and one of them was trained, only that one changes. Three things change both: a copy that
is saved along, which PEFT loads into the weight that they share; rows of the embeddings; a pair
with ``ensure_weight_tying``.

Source: ``peft/tuners/tuners_utils.py``; ``set_additional_trainable_modules`` in
``peft/utils/other.py``.
"""

from __future__ import annotations

from int4_lora.integration.adapter.adapter import Adapter, AdapterModule, Replacement
from int4_lora.integration.adapter.base_weights import BaseWeights
from int4_lora.integration.checkpoint.open import FLOATS
from int4_lora.integration.conversion.deltas import Change, Delta
from int4_lora.integration.conversion.replaced_tensors import Overwrite

__all__ = ["replaced_tensors", "steps_of"]


def steps_of(base: BaseWeights, adapter: Adapter, weight: float) -> dict[str, list[Change]]:
    """Return the steps of an adapter, for each module what replaces its weight, then its pair.

    Args:
        base: the base.
        adapter: an adapter.
        weight: its factor.

    Raises:
        ValueError: a weight is not in the base, or in another shape or in a format that cannot be
            changed, or a pair is not finite; the message names adapter and module.
    """
    overwrites = _overwrites(base, adapter)
    deltas = {name: Delta(pair, weight) for name, pair in _pairs(base, adapter).items()}
    vocabulary = base.vocabulary
    if vocabulary is not None:
        names = (vocabulary.embeddings, vocabulary.head)
        if {*names} & {*overwrites, *deltas} and base.is_tied:
            _follow_tie(adapter, *names, overwrites, deltas)
    return {
        name: [*filter(None, (overwrites.get(name), deltas.get(name)))]
        for name in (*overwrites, *(name for name in deltas if name not in overwrites))
    }


def replaced_tensors(base: BaseWeights, adapter: Adapter) -> dict[str, Replacement]:
    """Return what replaces tensors that are no matrices of modules, such as norms and biases.

    Args:
        base: the base.
        adapter: an adapter.

    Raises:
        ValueError: the base lacks a tensor, or has it in another shape; the message names it.
    """
    found = {}
    for name, replacement in adapter.replacements.items():
        if _matrix(base, name) is not None:
            continue
        where = f"{adapter.path}: {name}"
        stored = base.checkpoint.tensors.get(name)
        if stored is None:
            raise ValueError(f"{where}: {base.checkpoint.path} has no such tensor to replace")
        shape = list(replacement.tensor.shape)
        if (
            stored.dtype not in FLOATS
            or shape != list(stored.shape)
            or replacement.rows is not None
        ):
            actual = f"{stored.dtype} {list(stored.shape)}"
            raise ValueError(f"{where}: a float tensor of {shape} cannot replace {actual}")
        found[name] = replacement
    return found


def _matrix(base: BaseWeights, tensor: str) -> str | None:
    """Return the module whose matrix a tensor is, by its name in the base, or None."""
    if not tensor.endswith(".weight"):
        return None
    module = base.name_in_base(tensor.removesuffix(".weight"))
    return module if base.has_matrix(module) else None


def _overwrites(base: BaseWeights, adapter: Adapter) -> dict[str, Overwrite]:
    """Return what replaces weights of modules, after checks."""
    found = {}
    for name, replacement in adapter.replacements.items():
        module = _matrix(base, name)
        if module is None:
            continue
        where = f"{adapter.path}: {name}"
        rows, columns = base.matrix_shape(module, where)
        given = tuple(replacement.tensor.shape)
        last = -1
        if replacement.rows is not None:
            last = int(replacement.rows.max())
            given = (rows, *given[1:])
        _check_shape(where, given, (rows, columns))
        if last >= rows:
            raise ValueError(
                f"{where}: the adapter replaces the row of token {last}, the base has {rows} "
                "tokens: resize the base's vocabulary first"
            )
        found[module] = Overwrite(replacement)
    return found


def _pairs(base: BaseWeights, adapter: Adapter) -> dict[str, AdapterModule]:
    """Return the pairs of an adapter by the names of their modules in the base, after checks."""
    found: dict[str, AdapterModule] = {}
    for name, pair in adapter.modules.items():
        where, module = f"{adapter.path}: {name}", base.name_in_base(name)
        if module in found:
            raise ValueError(f"{where}: the adapter has another pair of the head {module}")
        _check_shape(where, (pair.b.shape[0], pair.a.shape[1]), base.matrix_shape(module, where))
        for matrix, values in (("lora_A", pair.a), ("lora_B", pair.b)):
            if not values.isfinite().all():
                raise ValueError(f"{where}: {matrix} must be finite to be merged")
        found[module] = pair
    return found


def _check_shape(where: str, given: tuple[int, ...], shape: tuple[int, int]) -> None:
    if given == shape:
        return
    module = where.rpartition(": ")[2].removesuffix(".weight").rpartition(".")[2]
    if module in ("lm_head", "embed_tokens") and given[1:] == shape[1:]:
        raise ValueError(
            f"{where}: the adapter is for a vocabulary of {given[0]} tokens, the base has "
            f"{shape[0]}: resize the base's vocabulary first"
        )
    raise ValueError(
        f"{where}: the adapter is for a weight of {list(given)}, the base has {list(shape)}"
    )


def _follow_tie(
    adapter: Adapter,
    embeddings: str,
    head: str,
    overwrites: dict[str, Overwrite],
    deltas: dict[str, Delta],
) -> None:
    """Add what changes the head and the embeddings together because they are tied."""
    for name, other in ((embeddings, head), (head, embeddings)):
        step = overwrites.get(name)
        if step is None or other in overwrites or not step.replacement.tied:
            continue
        if name == embeddings or step.replacement.rows is None:
            overwrites[other] = step
    if adapter.config.get("ensure_weight_tying") and embeddings in deltas and head not in deltas:
        deltas[head] = deltas[embeddings]
