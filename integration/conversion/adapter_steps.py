"""The steps by which one adapter changes the weights of a base.

PEFT applies what it trained to the module that it trained. If the base ties the head to the
embeddings and one of them was trained, only that one changes. Three things change both: a copy that
is saved along, which PEFT loads into the weight that they share; rows of the embeddings; a pair
with ``ensure_weight_tying``.

Source: ``peft/tuners/tuners_utils.py``; ``set_additional_trainable_modules`` in
``peft/utils/other.py``.
"""

from __future__ import annotations

import functools

from int4_lora.integration.adapter.adapter import Adapter, AdapterModule, Replacement
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.tied_embeddings import find_vocabulary, is_tied
from int4_lora.integration.conversion.deltas import Change, Delta
from int4_lora.integration.conversion.replaced_tensors import Overwrite

__all__ = ["Base", "replaced_tensors", "steps_of"]

FLOATS = ("F16", "BF16", "F32", "F64")


class Base:
    """A checkpoint as weights that adapters change.

    Args:
        checkpoint: an open checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.vocabulary = find_vocabulary(checkpoint)

    @functools.cached_property
    def is_tied(self) -> bool:
        """Whether the head is tied to the embeddings."""
        return self.vocabulary is not None and is_tied(self.checkpoint, self.vocabulary)

    def name(self, module: str) -> str:
        """Return the name of a module here: that of the head if it is the head that is not stored.

        Args:
            module: the module's name in an adapter.
        """
        vocabulary = self.vocabulary
        if vocabulary is None or vocabulary.head_is_stored or not self.is_tied:
            return module
        return vocabulary.head if module.rpartition(".")[2] == "lm_head" else module

    def has_matrix(self, module: str) -> bool:
        """Return whether a module has a weight of two dimensions, packed, dense or tied."""
        module = self.stored_name(module)
        if module in self.checkpoint.schemes:
            return True
        stored = self.checkpoint.tensors.get(f"{module}.weight")
        return stored is not None and len(stored.shape) == 2

    def shape(self, module: str, where: str) -> tuple[int, int]:
        """Return ``(out_features, in_features)`` of the weight of a module.

        Args:
            module: the module's name here.
            where: the beginning of the error message.

        Raises:
            ValueError: there is no such weight, or it is in a format that cannot be changed.
        """
        checkpoint, module = self.checkpoint, self.stored_name(module)
        if module in checkpoint.schemes:
            if not checkpoint.is_packed(module):
                scheme = checkpoint.schemes[module]
                kind = f"{scheme.format} of {scheme.kind}, {scheme.bits} bits"
                raise ValueError(
                    f"{where}: it is {kind}, in {checkpoint.path}, which is not merged into"
                )
            return checkpoint.shape_of(module)
        stored = checkpoint.tensors.get(f"{module}.weight")
        if stored is None:
            raise ValueError(f"{where}: {checkpoint.path} has no such weight")
        if len(stored.shape) != 2 or stored.dtype not in FLOATS:
            actual = f"{stored.dtype} {list(stored.shape)}"
            raise ValueError(
                f"{where}: its weight must be a floating matrix, the base has {actual}"
            )
        return stored.shape[0], stored.shape[1]

    def stored_name(self, module: str) -> str:
        """Return the module whose weight is stored: the embeddings for a head that is not.

        Args:
            module: the module's name here.
        """
        vocabulary = self.vocabulary
        is_head = vocabulary is not None and module == vocabulary.head
        if vocabulary is None or not is_head or vocabulary.head_is_stored or not self.is_tied:
            return module
        return vocabulary.embeddings


def steps_of(base: Base, adapter: Adapter, weight: float) -> dict[str, list[Change]]:
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


def replaced_tensors(base: Base, adapter: Adapter) -> dict[str, Replacement]:
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


def _matrix(base: Base, tensor: str) -> str | None:
    """Return the module whose matrix a tensor is, by its name in the base, or None."""
    if not tensor.endswith(".weight"):
        return None
    module = base.name(tensor.removesuffix(".weight"))
    return module if base.has_matrix(module) else None


def _overwrites(base: Base, adapter: Adapter) -> dict[str, Overwrite]:
    """Return what replaces weights of modules, after checks."""
    found = {}
    for name, replacement in adapter.replacements.items():
        module = _matrix(base, name)
        if module is None:
            continue
        where = f"{adapter.path}: {name}"
        rows, columns = base.shape(module, where)
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


def _pairs(base: Base, adapter: Adapter) -> dict[str, AdapterModule]:
    """Return the pairs of an adapter by the names of their modules in the base, after checks."""
    found: dict[str, AdapterModule] = {}
    for name, pair in adapter.modules.items():
        where, module = f"{adapter.path}: {name}", base.name(name)
        if module in found:
            raise ValueError(f"{where}: the adapter has another pair of the head {module}")
        _check_shape(where, (pair.b.shape[0], pair.a.shape[1]), base.shape(module, where))
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
