"""LoRA on the parameters of ``Int4Experts``: PEFT's ``target_parameters``, without dense weights.

PEFT's own wrapper of a parameter adds ``B A`` of all experts to the dense weights of all experts in
every forward. Here each used expert multiplies by its A and B beside its INT4 weight.

- The pairs are PEFT's: its files, ranks, patterns and initialisations stay as they are.
- A batch with an adapter for each row, which PEFT refuses on parameters, is one call of
  ``int4_moe``.
- ``merge_and_unload`` gives transformers' dense experts, each weight rounded once;
  ``merge_adapter`` is refused.

Source: ``ParamWrapper`` in ``peft/tuners/lora/layer.py``, PEFT 0.19 to 0.21.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import peft.tuners.lora.layer as lora
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from int4_lora.compiled import PreparedExpertsLoRA, PreparedLoRA, prepare_lora
from int4_lora.integration.huggingface.dequantised import READ_ONLY, dense_weight
from int4_lora.integration.huggingface.hooks import carry_hooks
from int4_lora.integration.huggingface.int4_experts import DOWN, GATE_UP, Int4Experts
from int4_lora.integration.huggingface.peft_layer import BACKEND, check_start
from int4_lora.reference import LoRAStack
from int4_lora.reference.rounding import round_once

__all__ = ["ParamWrapper", "parameters_named"]

Base: Any = getattr(lora, "ParamWrapper", nn.Module)  # PEFT 0.17 and later has it
Names = tuple[str, ...]  # adapters whose deltas are added


class ParamWrapper(Base):
    """PEFT's LoRA on ``gate_up_proj`` or on ``down_proj`` of ``Int4Experts``.

    PEFT recognises wrappers of parameters by this name of their class. It nests those of one
    module: the outermost computes, with the adapters of both.

    Args:
        base_layer: the ``Int4Experts``, or the wrapper of its other parameter.
        adapter_name: the name of the first adapter.
        parameter_name: "gate_up_proj" or "down_proj".
        settings: as PEFT passes them.
    """

    quantization_backend = BACKEND

    def update_layer(self, adapter_name: str, *args: Any, **settings: Any) -> None:
        """Add an adapter, unless its start would change the base's weight.

        Raises:
            ValueError: the adapter changes the base's weight, or PEFT is too old; the message names
                the option or the version.
        """
        check_start(settings.get("config"), settings)
        super().update_layer(adapter_name, *args, **settings)
        columns, given = self.get_param().shape[2], self.lora_A[adapter_name].in_features
        if given != columns:
            raise ValueError(
                f"lora_A of {self.parameter_name} must have the {columns} columns of the weight, "
                f"got {given}: adapters of packed experts need PEFT 0.19"
            )

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapter_names: Sequence[str] | None = None,
    ) -> Tensor:
        """Return the experts with the adapters of both parameters.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: int ``[tokens, k]``.
            top_k_weights: ``[tokens, k]``, float.
            adapter_names: the adapter of each row of the batch, whose tokens follow each other;
                None for the active adapters.
        """
        wrappers, x = self._wrappers(), hidden_states
        experts: Int4Experts = self.get_base_layer()
        names: list[list[Names]]
        if adapter_names is None:
            names = [[() if one.disable_adapters else (*one.active_adapters,)] for one in wrappers]
            ids = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        else:
            known = {name for one in wrappers for name in one.lora_A}
            singles = [name for name in dict.fromkeys(adapter_names) if name in known]
            names = [[(name,) for name in singles]] * len(wrappers)
            ids = _ids(adapter_names, x, singles)
        chosen, topk_ids = None, top_k_index
        if not _trains(wrappers):
            chosen, topk_ids = _used(top_k_index, experts.num_experts)
        pairs = {
            one.parameter_name: _pairs(one, each, chosen)
            for one, each in zip(wrappers, names, strict=True)
        }
        if all(pair is None for pair in pairs.values()):
            return experts(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        lora = PreparedExpertsLoRA(
            gate_up=pairs.get(GATE_UP),
            down=pairs.get(DOWN),
            adapters=len(names[0]),
            experts=experts.num_experts if chosen is None else len(chosen),
        )
        y: Tensor = experts(x, topk_ids, top_k_weights, lora, ids, chosen=chosen)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge into INT4.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(READ_ONLY)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the experts without adapters: dense with them merged in, or the packed base.

        Args:
            merge: whether to merge.
            safe_merge: whether to refuse a result with NaN or infinities.
            adapter_names: the adapters to merge; None for the active ones.

        Returns:
            transformers' dense experts in the dtype of the model, each weight rounded once; the
            base if there is nothing to merge.

        Raises:
            ValueError: with ``safe_merge``, a merged weight is not finite.
        """
        experts: Int4Experts = self.get_base_layer()
        wrappers = {one.parameter_name: one for one in self._wrappers()}
        names = self.active_adapters if adapter_names is None else adapter_names
        if not merge or not any(name in one.lora_A for one in wrappers.values() for name in names):
            return experts
        with torch.no_grad():
            dense = experts.dense_module(_merged(experts, wrappers, names, safe=safe_merge))
        carry_hooks(experts, dense)
        if experts.record is not None and experts.name is not None:
            prefix = experts.name
            experts.record.became_dense(*(f"{prefix}.{one}" for one in experts.module_names()))
        return dense

    def _wrappers(self) -> list[Any]:
        """Return the wrappers of the parameters of these experts, this one first."""
        wrappers: list[Any] = [self]
        while isinstance(wrappers[-1].base_layer, ParamWrapper):
            wrappers.append(wrappers[-1].base_layer)
        return wrappers


@contextlib.contextmanager
def parameters_named(model: nn.Module) -> Iterator[None]:
    """Let ``named_parameters`` of a model name the parameters of its packed experts.

    PEFT finds the parameters that it wraps in this way. Nothing else may: they are computed where
    they are read.

    Args:
        model: a model with packed experts, or without.
    """
    packed = [module for module in model.modules() if isinstance(module, Int4Experts)]
    changed = dict.fromkeys([model, *packed]) if packed else {}
    for module in changed:
        module.__dict__["named_parameters"] = functools.partial(_named_parameters, module)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["named_parameters"]


def _named_parameters(
    module: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a module, and those that stand for packed experts."""
    yield from nn.Module.named_parameters(module, prefix, recurse, remove_duplicate)
    modules = module.named_modules(prefix=prefix) if recurse else [(prefix, module)]
    for name, inner in modules:
        if isinstance(inner, Int4Experts):
            for parameter in (GATE_UP, DOWN):
                yield f"{name}.{parameter}" if name else parameter, getattr(inner, parameter)


def _ids(adapter_names: Sequence[str], x: Tensor, singles: Sequence[str]) -> Tensor:
    """Return the adapter of each token; -1 for PEFT's ``__base__``.

    Raises:
        ValueError: the tokens are no multiple of the rows.
    """
    if x.shape[0] % len(adapter_names):
        raise ValueError(
            f"adapter_names must name an adapter for each row of the batch, got "
            f"{len(adapter_names)} names for {x.shape[0]} tokens"
        )
    index = {name: place for place, name in enumerate(singles)}
    rows = torch.tensor([index.get(name, -1) for name in adapter_names], device=x.device)
    return rows.repeat_interleave(x.shape[0] // len(adapter_names))


def _trains(wrappers: Sequence[Any]) -> bool:
    """Return whether gradients of the adapters may be needed."""
    if not torch.is_grad_enabled():
        return False
    return any(parameter.requires_grad for one in wrappers for parameter in _matrices(one))


def _matrices(wrapper: Any) -> Iterator[Tensor]:
    """Yield A and B of all adapters of a wrapper."""
    for side in (wrapper.lora_A, wrapper.lora_B):
        for layer in side.values():
            yield layer.weight


def _used(topk_ids: Tensor, experts: int) -> tuple[list[int] | None, Tensor]:
    """Return the experts that are used, and the ids that number them; None for all experts.

    The adapters of others are not read. There are powers of two of them, the first once more where
    some are missing, so that few graphs are compiled.
    """
    valid = (topk_ids >= 0) & (topk_ids < experts)
    used = torch.unique(topk_ids[valid])
    size = 1 << (max(len(used), topk_ids.shape[1]) - 1).bit_length()
    if not len(used) or size >= experts:
        return None, topk_ids
    place = torch.full((experts + 1,), -1, dtype=topk_ids.dtype, device=topk_ids.device)
    place[used] = torch.arange(len(used), dtype=topk_ids.dtype, device=topk_ids.device)
    numbers = used.tolist()
    chosen = numbers + numbers[:1] * (size - len(numbers))
    return chosen, place[torch.where(valid, topk_ids, experts)]


def _pairs(
    wrapper: Any, names: Sequence[Names], chosen: Sequence[int] | None
) -> PreparedLoRA | None:
    """Return the pairs of a parameter, adapters first and then experts; None where there are none.

    Args:
        wrapper: the wrapper of the parameter.
        names: for each adapter id the adapters that are added.
        chosen: the experts that have pairs; None for all.
    """
    stacks = [_of_experts(wrapper, each, chosen) for each in names]
    given = [stack for stack in stacks if stack is not None]
    if not given:
        return None
    dtype, rank = given[0].a.dtype, max(stack.rank for stack in given)
    for stack in given:
        dtype = torch.promote_types(dtype, stack.a.dtype)
    zeros = LoRAStack(*(torch.zeros_like(t) for t in (given[0].a, given[0].b, given[0].scaling)))
    padded = [zeros if stack is None else stack for stack in stacks]
    a = torch.cat([pad(one.a.to(dtype), (0, 0, 0, rank - one.rank)) for one in padded])
    b = torch.cat([pad(one.b.to(dtype), (0, rank - one.rank)) for one in padded])
    return prepare_lora(LoRAStack(a, b, torch.cat([one.scaling for one in padded])))


def _of_experts(wrapper: Any, names: Names, chosen: Sequence[int] | None) -> LoRAStack | None:
    """Return the pair of each expert, of several adapters side by side; None if there are none."""
    pairs = [_by_expert(wrapper, name) for name in names if name in wrapper.lora_A]
    if not pairs:
        return None
    if chosen is not None:
        index = torch.tensor(chosen, device=pairs[0][0].device)
        pairs = [(a.index_select(0, index), b.index_select(0, index), s) for a, b, s in pairs]
    if pairs[1:]:  # B with its scaling, in float32 at least
        dtype = torch.float32
        for a, _, _ in pairs:
            dtype = torch.promote_types(dtype, a.dtype)
        a = torch.cat([a.to(dtype) for a, _, _ in pairs], dim=1)
        b = torch.cat([b.to(dtype) * scaling for _, b, scaling in pairs], dim=2)
        pairs = [(a, b, 1.0)]
    a, b, scaling = pairs[0]
    return LoRAStack(a, b, torch.full((len(a),), scaling, dtype=torch.float64, device=a.device))


def _by_expert(wrapper: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """Return views of an adapter's pairs: A ``[experts, rank, in]``, B ``[experts, out, rank]``.

    A has the rows of an expert together, B the columns of a rank.
    """
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    experts = wrapper.num_experts
    a = a.reshape(experts, -1, a.shape[1])
    b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    return a, b, float(wrapper.scaling[name])


def _merged(
    experts: Int4Experts, wrappers: dict[str, Any], names: Sequence[str], *, safe: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``gate_up`` and ``down`` of each expert with adapters merged in, rounded once."""
    prepared, dtype = experts.prepared, experts.gate_up_proj.dtype
    for expert in range(experts.num_experts):
        weights = []
        for parameter, layer in ((GATE_UP, prepared.gate_up), (DOWN, prepared.down)):
            wide = dense_weight(layer[expert], torch.float64)
            for name in names:
                if parameter in wrappers and name in wrappers[parameter].lora_A:
                    a, b, scaling = _by_expert(wrappers[parameter], name)
                    wide += scaling * (b[expert].double() @ a[expert].double())
            weight = round_once(wide, dtype)
            if safe and not weight.isfinite().all():
                raise ValueError(
                    f"{experts.name or 'the experts'}: merged weights of {parameter} of expert "
                    f"{expert} are not finite in {dtype}"
                )
            weights.append(weight)
        gate_up, down = weights
        yield gate_up, down
