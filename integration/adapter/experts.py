"""Read the pairs that PEFT made for single parameters (``target_parameters``), such as experts.

For a parameter of E experts, ``[E, out, in]`` or ``[E, in, out]``, PEFT saves one pair of rank r::

    lora_A [E * r, in], rows ordered by (expert, rank)
    lora_B [out, r * E], columns ordered by (rank, expert)

It wraps a module once for each of its parameters, in the order in which the module declares them:
``experts.base_layer.lora_A`` is of the first parameter, ``experts.lora_A`` of the last. The file
does not name the parameters; ``target_parameters`` of the config does, without the order.

Source: ``ParamWrapper`` in ``peft/tuners/lora/layer.py``; ``_inject_parameters`` in
``peft/tuners/tuners_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from int4_lora.integration.adapter.adapter import Adapter, AdapterModule
from int4_lora.integration.adapter.config import rank_of, scaling_of
from int4_lora.integration.adapter.keys import KeyedTensor
from int4_lora.integration.adapter.pairs import read_pair, where_of
from int4_lora.integration.adapter.targeting import ALL_LINEAR, is_targeted
from int4_lora.integration.checkpoint.open import Checkpoint

__all__ = [
    "DOWN",
    "GATE_UP",
    "INNER",
    "check_all_experts",
    "parameter_modules",
    "parameter_owners",
]

INNER = ".base_layer"
GATE_UP, DOWN = "gate_up_proj", "down_proj"
EXPERT = re.compile(
    r"(?P<owner>.+)\.(?P<expert>\d+)\.(gate_up_proj|down_proj|gate_proj|up_proj|w1|w2|w3)"
)
TRANSPOSED_BEFORE = (0, 19)  # of PEFT, which then took any parameter for [E, in, out]


@dataclass(frozen=True)
class _Pair:
    """One pair for all experts of a parameter; ``where`` is for messages."""

    where: str
    a: Tensor
    b: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of B and columns of A: ``(out, in)`` of one expert."""
        return self.b.shape[0], self.a.shape[1]


def parameter_owners(
    config: Mapping[str, Any], pairs: Mapping[str, object]
) -> dict[str, list[str]]:
    """Return the modules whose pairs are of parameters, not of linear layers.

    Args:
        config: the content of adapter_config.json.
        pairs: anything by the names of the modules in the adapter's file, ``.base_layer`` included.

    Returns:
        The names in the file by the module that they wrap, the innermost first.

    Example:
        >>> config = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
        >>> parameter_owners(config, {"mlp.experts": 0, "mlp.experts.base_layer": 0, "q_proj": 0})
        {'mlp.experts': ['mlp.experts.base_layer', 'mlp.experts']}
    """
    names: dict[str, list[str]] = {}
    for name in pairs:
        names.setdefault(_owner(name), []).append(name)
    return {
        owner: sorted(levels, key=len, reverse=True)
        for owner, levels in names.items()
        if levels != [owner] or (_candidates(config, owner) and not _is_linear(config, owner))
    }


def parameter_modules(
    config: Mapping[str, Any], owner: str, pairs: Sequence[Mapping[str, KeyedTensor]]
) -> dict[str, AdapterModule]:
    """Read the pairs of a module's parameters; experts get a pair each.

    Args:
        config: the content of adapter_config.json.
        owner: the name of the module.
        pairs: lora_A and lora_B of each parameter, under "A" and "B", the innermost first.

    Returns:
        The pair of each weight: ``owner`` for its parameter ``weight``, ``owner.<expert>.<name>``
        for a parameter of experts.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: the config and the shapes do not say which parameter a pair is of, or contradict
            each other; the message names file and module.
    """
    read = [_Pair(where_of(owner, pair), *read_pair(owner, pair)) for pair in pairs]
    named = _named(config, owner, read)
    modules: dict[str, AdapterModule] = {}
    counts: dict[str, int] = {}
    for name, (pair, swapped) in named.items():
        rank = rank_of(config, f"{owner}.{name}")
        count = _experts(pair, name, rank)
        if count > 1 or name in (GATE_UP, DOWN):
            counts[name] = count
        scaling = scaling_of(config, f"{owner}.{name}")
        for expert in range(count):
            a, b = _of_expert(pair, expert, count, rank)
            if swapped:
                a, b = b.T.contiguous(), a.T.contiguous()
            modules[_module_name(owner, name, expert, count)] = AdapterModule(a, b, scaling)
    if len(set(counts.values())) > 1:
        raise ValueError(f"{read[0].where}: its parameters have different experts: {counts}")
    return modules


def check_all_experts(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Check that pairs of ``target_parameters`` are for all experts of the base.

    Their number follows from the rank in the config. A rank that is too large would leave the last
    experts of the base as they are.

    Args:
        adapter: an adapter, under the names of the base.
        checkpoint: the base model.

    Raises:
        ValueError: the base has more experts; the message names the module and both numbers.
    """
    if not adapter.config.get("target_parameters"):
        return
    counts: dict[str, int] = {}
    for name in adapter.modules:
        if match := EXPERT.fullmatch(name):
            owner = match["owner"]
            counts[owner] = max(counts.get(owner, 0), int(match["expert"]) + 1)
    for name in checkpoint.tensors:
        match = re.match(r"(.+)\.(\d+)\.", name)
        if match and int(match[2]) >= counts.get(match[1], int(match[2]) + 1):
            raise ValueError(
                f"{adapter.path}: {match[1]}: the adapter has pairs for {counts[match[1]]} experts "
                f"by its shapes and its config's rank, {checkpoint.path} has more"
            )


def _owner(name: str) -> str:
    while name.endswith(INNER):
        name = name.removesuffix(INNER)
    return name


def _candidates(config: Mapping[str, Any], owner: str, levels: int | None = None) -> list[str]:
    """Return the parameters of a module that ``target_parameters`` may mean.

    Args:
        config: the content of adapter_config.json.
        owner: the module's name.
        levels: for how many parameters there are pairs. PEFT takes a bare ``down_proj`` for a
            parameter of any module; if all that match are too many, those count that name the
            module too, such as ``gate.weight``.
    """
    names: dict[str, bool] = {}
    for target in config.get("target_parameters") or ():
        module, _, name = target.rpartition(".")
        if f".{owner}.{name}".endswith(f".{target}"):
            names[name] = names.get(name, False) or module != ""
    if levels is not None and len(names) > levels:
        return sorted(name for name, names_module in names.items() if names_module)
    return sorted(names)


def _is_linear(config: Mapping[str, Any], owner: str) -> bool:
    """Return whether ``target_modules`` names a module; then its pair is of a linear layer."""
    targets = config.get("target_modules")
    return targets is not None and targets != ALL_LINEAR and is_targeted(config, owner)


def _named(
    config: Mapping[str, Any], owner: str, pairs: Sequence[_Pair]
) -> dict[str, tuple[_Pair, bool]]:
    """Return each parameter's pair, and whether its A belongs to the rows of the weight."""
    where, names = pairs[0].where, _candidates(config, owner, len(pairs))
    shapes = [pair.shape for pair in pairs]
    if len(names) != len(pairs):
        raise ValueError(
            f"{where}: the file holds pairs of {len(pairs)} of its parameters, but "
            f"target_parameters names {_candidates(config, owner) or 'none'}"
        )
    if len(pairs) == 1:
        _check_side_of_a(config, names[0], pairs[0])
        return {names[0]: (pairs[0], False)}
    if names != [DOWN, GATE_UP]:
        raise ValueError(
            f"{where}: target_parameters names {names}, and nothing says which pair is of which: "
            f"only {GATE_UP} and {DOWN} can be told apart by their shapes"
        )
    for gate_up, down in (pairs, pairs[::-1]):
        for swapped in (False, True):
            step = -1 if swapped else 1
            rows, columns = gate_up.shape[::step]
            if down.shape[::step] == (columns, rows / 2):
                return {GATE_UP: (gate_up, swapped), DOWN: (down, swapped)}
    raise ValueError(
        f"{where}: of {GATE_UP} [2 * inter, hidden] and {DOWN} [hidden, inter] the pairs must have "
        f"the shapes, got {list(shapes[0])} and {list(shapes[1])}"
    )


def _check_side_of_a(config: Mapping[str, Any], name: str, pair: _Pair) -> None:
    """Refuse a pair alone of which A may belong to the rows of the weight or to its columns.

    PEFT before 0.19 takes ``[E, out, in]`` for ``[E, in, out]``. If the weight is not square, the
    base's shape shows that later, and the pair is refused.
    """
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version", "")))
    is_new = version is not None and (int(version[1]), int(version[2])) >= TRANSPOSED_BEFORE
    if name != "weight" and pair.shape[0] == pair.shape[1] and not is_new:
        side = pair.shape[0]
        raise ValueError(
            f"{pair.where}: PEFT before 0.19 wrote lora_A of {name} for its rows if the model has "
            f"it as [experts, out, in], and this weight is square ({side}), so that its shape does "
            f"not show it; peft_version in adapter_config.json is {config.get('peft_version')!r}"
        )


def _experts(pair: _Pair, name: str, rank: int) -> int:
    """Return for how many experts a pair is."""
    rows, columns = pair.a.shape[0], pair.b.shape[1]
    if rows != columns or rows % rank or rows == 0:
        raise ValueError(
            f"{pair.where}: lora_A of {name} must be [experts * {rank}, in] and lora_B "
            f"[out, {rank} * experts] by the config's rank, got {list(pair.a.shape)} and "
            f"{list(pair.b.shape)}"
        )
    return rows // rank


def _of_expert(pair: _Pair, expert: int, count: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return A ``[rank, in]`` and B ``[out, rank]`` of one expert."""
    a = pair.a.view(count, rank, -1)[expert]
    b = pair.b.view(-1, rank, count)[:, :, expert]
    return a.contiguous(), b.contiguous()


def _module_name(owner: str, name: str, expert: int, count: int) -> str:
    if count == 1 and name not in (GATE_UP, DOWN):
        return owner if name == "weight" else f"{owner}.{name}"
    return f"{owner}.{expert}" if name == "weight" else f"{owner}.{expert}.{name}"
