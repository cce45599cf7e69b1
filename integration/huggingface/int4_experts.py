"""The experts of one layer, whose INT4 weights stay packed, in place of transformers' dense ones.

transformers 5 holds the experts of a layer in two parameters, ``gate_up_proj`` and ``down_proj``.
Here the checkpoint's tensors are held once, in the layout of ``int4_lora.compiled.prepare``, as
frozen buffers whose first dimension is the expert. They move between devices and are never cast;
``state_dict`` gives the checkpoint's names and tensors, bit for bit, lazily within a layer of PEFT.

Source: ``Qwen3MoeExperts`` of transformers 5; ``docs/format.md`` for the names.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from int4_lora.compiled import (
    PreparedExperts,
    PreparedExpertsLoRA,
    PreparedWeight,
    int4_moe,
    prepare,
)
from int4_lora.integration.checkpoint.experts import join_rows
from int4_lora.integration.checkpoint.open import PARTS
from int4_lora.integration.huggingface.dense_record import DenseRecord
from int4_lora.integration.huggingface.dequantised import (
    READ_ONLY,
    DequantisedWeight,
    WeightOfExperts,
)
from int4_lora.integration.huggingface.int4_linear import FIELDS, PEFT
from int4_lora.integration.huggingface.layout_tensors import moved, named_tensors, with_tensors
from int4_lora.integration.huggingface.lazy_tensor import LazyTensor
from int4_lora.integration.huggingface.registration import register
from int4_lora.integration.huggingface.stored_tensors import given_tensors, other_entries
from int4_lora.reference import ExpertsWeight, PackedWeight
from int4_lora.reference.lora import accumulation_dtype
from int4_lora.reference.moe import Activation

__all__ = ["DOWN", "GATE_UP", "Int4Experts"]

GATE_UP, DOWN = "gate_up_proj", "down_proj"  # transformers' parameters
LAYERS = ("gate_up", "down")  # of ExpertsWeight
NAMES = ("gate_proj", "up_proj", "down_proj")


class _Held(NamedTuple):
    """The buffers, and the experts that are views of them."""

    buffers: Mapping[str, Tensor]
    experts: PreparedExperts


class Int4Experts(nn.Module):
    """``sum_j p_j * down(act(gate(x)) * up(x))`` over a token's experts, whose weights are frozen.

    ``gate_up_proj`` and ``down_proj`` return the dense weights of all experts as read-only tensors
    that are computed where they are used.

    Args:
        experts: the checkpoint's tensors, on the device that computes.
        activation: "silu" or "gelu_tanh".
        names: the checkpoint's names of gate, up and down of an expert.
        dtype: the dtype of the dense weights, such as that of the model; None for the scales'.
        shape_dtype: the dtype in which the checkpoint stores ``weight_shape``; None if it does not.
        scalars: whether the checkpoint stores the one scale of a tensor with the shape [].
        dense: transformers' module without parameters, of which ``dense_module`` makes the dense
            experts; None if nothing is merged.

    Raises:
        TypeError: ``experts`` is no ExpertsWeight.
        ValueError: the experts' ``g_idx`` differ in kind, so that they need different layouts.

    Example:
        >>> from int4_lora.reference import quantize
        >>> gate_up, down = (quantize(torch.ones(shape)) for shape in ((256, 128), (128, 128)))
        >>> experts = Int4Experts(ExpertsWeight([gate_up] * 2, [down] * 2))
        >>> experts(torch.ones(3, 128), torch.tensor([[0], [1], [1]]), torch.ones(3, 1)).shape
        torch.Size([3, 128])
        >>> sorted(experts.state_dict())[:3]
        ['0.down_proj.weight_packed', '0.down_proj.weight_scale', '0.down_proj.weight_shape']
    """

    name: str | None = None
    record: DenseRecord | None = None  # of the model; keep_packed sets both

    _layouts: dict[str, PreparedWeight]  # of any expert, on the meta device
    _held: _Held | None

    def __init__(
        self,
        experts: ExpertsWeight,
        activation: Activation = "silu",
        *,
        names: Sequence[str] = NAMES,
        dtype: torch.dtype | None = None,
        shape_dtype: torch.dtype | None = torch.int64,
        scalars: bool = False,
        dense: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(experts, ExpertsWeight):
            raise TypeError(f"experts must be an ExpertsWeight, got {type(experts).__name__}")
        self.num_experts = experts.count
        self.activation: Activation = activation
        self.hidden_dim, self.intermediate_dim = experts.hidden, experts.inter
        self.names = tuple(names)
        self._dtype = dtype or experts.down[0].scale.dtype
        self._shape_dtype, self._scalars = shape_dtype, scalars
        self.__dict__["_dense"] = dense  # no submodule
        self._is_hf_initialized = True  # transformers must not initialise it
        self._layouts = {}
        self._hold(experts)

    @property
    def gate_up_proj(self) -> Tensor:
        """The dense gate and up of all experts, read-only: see ``DequantisedWeight``."""
        return DequantisedWeight(WeightOfExperts(self.prepared.gate_up), self._dtype)

    @gate_up_proj.setter
    def gate_up_proj(self, value: object) -> None:
        raise RuntimeError(READ_ONLY)

    @property
    def down_proj(self) -> Tensor:
        """The dense down of all experts, read-only: see ``DequantisedWeight``."""
        return DequantisedWeight(WeightOfExperts(self.prepared.down), self._dtype)

    @down_proj.setter
    def down_proj(self, value: object) -> None:
        raise RuntimeError(READ_ONLY)

    @property
    def prepared(self) -> PreparedExperts:
        """The experts in the layouts that compute, as views of the current buffers.

        Whoever moves a model may replace its buffers. A layout may suit one kind of device only, so
        the experts are laid out again after they moved to another.
        """
        held = self._held
        if held is not None:
            for name, tensor in held.buffers.items():
                if self._buffers[name] is not tensor:
                    break
            else:
                return held.experts
        experts = PreparedExperts(*(tuple(self._views(layer)) for layer in LAYERS))
        if experts.device.type not in (self._device_type, "meta"):
            self._hold(experts.experts_weight())
            return self.prepared
        buffers = {name: self.get_buffer(name) for name in self.packed_names}
        self._held = _Held(buffers, experts)
        return experts

    @property
    def packed_names(self) -> tuple[str, ...]:
        """The names of the buffers that hold the weights."""
        return tuple(f"{layer}_{name}" for layer in LAYERS for name in self._tensors_of(layer))

    def experts_weight(self) -> ExpertsWeight:
        """Return the checkpoint's tensors, gate and up of an expert joined."""
        return self.prepared.experts_weight()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        lora: PreparedExpertsLoRA | None = None,
        adapter_ids: Tensor | None = None,
        *,
        chosen: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the sum of each token's experts: ``int4_moe`` of their weights.

        Differentiable in ``hidden_states``, ``top_k_weights`` and the adapters.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: int ``[tokens, k]``; an id outside ``[0, experts)`` adds nothing.
            top_k_weights: ``[tokens, k]``, float.
            lora: returned by ``prepare_experts_lora``, or None.
            adapter_ids: int32 or int64 ``[tokens]``, -1 for none; or None.
            chosen: the experts that ``top_k_index`` and ``lora`` number; None for all.

        Returns:
            ``[tokens, hidden]`` in the dtype of ``hidden_states``, computed in that of autocast.
        """
        x, kind = hidden_states, hidden_states.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        experts = self.prepared
        if chosen is not None:
            experts = PreparedExperts(
                tuple(experts.gate_up[expert] for expert in chosen),
                tuple(experts.down[expert] for expert in chosen),
            )
        p = top_k_weights.to(accumulation_dtype(x))
        y = int4_moe(x, experts, top_k_index, p, lora, adapter_ids, activation=self.activation)
        return y.to(hidden_states.dtype)

    def dense_module(self, weights: Iterator[tuple[Tensor, Tensor]]) -> nn.Module:
        """Return transformers' dense module with these weights, frozen.

        Args:
            weights: ``gate_up`` and ``down`` of each expert in turn, in the dtype to hold.

        Raises:
            RuntimeError: the experts were made without a dense module.
        """
        dense = self.__dict__["_dense"]
        if dense is None:
            raise RuntimeError("these experts were made without transformers' dense module")
        shapes = {GATE_UP: (2 * self.intermediate_dim, self.hidden_dim)}
        shapes[DOWN] = (self.hidden_dim, self.intermediate_dim)
        device, dtype = self.prepared.device, self._dtype
        for name, shape in shapes.items():
            tensor = torch.empty(self.num_experts, *shape, dtype=dtype, device=device)
            dense.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        for expert, (gate_up, down) in enumerate(weights):
            getattr(dense, GATE_UP).data[expert] = gate_up
            getattr(dense, DOWN).data[expert] = down
        module: nn.Module = dense.train(self.training)
        return module

    def module_names(self) -> Iterator[str]:
        """Yield the names, below this module, of the linears that the checkpoint stores."""
        for expert in range(self.num_experts):
            for name in self.names:
                yield f"{expert}.{name}"

    def extra_repr(self) -> str:
        """Describe the experts as torch prints them."""
        layout = type(self._layouts["gate_up"]).__name__.removesuffix("Weight")
        return (
            f"{self.num_experts} experts, hidden={self.hidden_dim}, inter={self.intermediate_dim}, "
            f"activation={self.activation}, layout={layout}"
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; refuse one in place of the packed weights."""
        if name in (GATE_UP, DOWN):
            raise RuntimeError(READ_ONLY)
        super().register_parameter(name, param)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or of a pickle: each tensor once, without its views."""
        return {**self.__dict__, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy, or of a pickle that another process may have written."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.record is not None:  # as keep_packed did
            register()

    def _tensors_of(self, layer: str) -> dict[str, Tensor]:
        """Return the tensors of the layout of a layer, on the meta device."""
        return named_tensors(self._layouts[layer])

    def _views(self, layer: str) -> Iterator[PreparedWeight]:
        """Yield the weight of each expert, as a view of the buffers."""
        names = [*self._tensors_of(layer)]
        rows = zip(*(self.get_buffer(f"{layer}_{name}").unbind() for name in names), strict=True)
        for tensors in rows:
            yield with_tensors(self._layouts[layer], dict(zip(names, tensors, strict=True)))

    def _hold(self, experts: ExpertsWeight) -> None:
        """Lay out the experts for their device and hold them."""
        for name in self.packed_names if self._layouts else ():
            del self._buffers[name]
        self._device_type = experts.down[0].packed.device.type
        self._held = None
        for layer in LAYERS:
            self._hold_layer(layer, getattr(experts, layer))

    def _hold_layer(self, layer: str, weights: Sequence[PackedWeight]) -> None:
        """Lay out a layer of all experts, one expert at a time, into the layer's buffers."""
        signature: tuple[object, ...] = ()
        for expert, weight in enumerate(weights):
            plain = {name: tensor.detach() for name, tensor in named_tensors(weight).items()}
            layout = prepare(with_tensors(weight, plain))
            tensors = named_tensors(layout)
            if expert == 0:
                signature = layout.signature
                meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
                self._layouts[layer] = with_tensors(layout, meta)
                for name, tensor in tensors.items():
                    buffer = _for_all(tensor, len(weights))
                    self.register_buffer(f"{layer}_{name}", buffer, persistent=False)
            elif layout.signature != signature:
                raise ValueError(
                    f"all experts must have one layout: expert {expert} of {layer} has another "
                    "than expert 0, as their g_idx differ in kind"
                )
            for name, tensor in tensors.items():
                self.get_buffer(f"{layer}_{name}")[expert] = tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Experts:
        """Apply ``fn`` as torch does, but move the weights without a cast."""
        held = {name: self._buffers.pop(name) for name in self.packed_names}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(held)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        for name, tensor in held.items():
            assert tensor is not None
            self._buffers[name] = moved(fn, tensor)
        _ = self.prepared
        return self

    def _projections(
        self, expert: int, words: Callable[[PreparedWeight], Tensor]
    ) -> Iterator[tuple[str, PackedWeight, slice, PreparedWeight]]:
        """Yield name, weight, rows and layout of each projection of an expert.

        Args:
            expert: the expert.
            words: returns the words of a layout, or what stands in for them.
        """
        inter = self.intermediate_dim
        spans = (slice(0, inter), slice(inter, 2 * inter), slice(0, self.hidden_dim))
        gate_up, down = (getattr(self.prepared, layer)[expert] for layer in LAYERS)
        for name, rows, layout in zip(self.names, spans, (gate_up, gate_up, down), strict=True):
            weight = layout.with_words(words(layout))
            yield name, weight if layout is down else weight.rows(rows), rows, layout

    def _stored(self, weight: PackedWeight) -> dict[str, Tensor]:
        """Return the tensors of a projection as the checkpoint stores them."""
        found: dict[str, Tensor] = {}
        for part in PARTS:
            if part == "weight_shape":
                if self._shape_dtype is not None:
                    device = weight.packed.device
                    found[part] = torch.tensor(weight.shape, dtype=self._shape_dtype, device=device)
            elif (tensor := getattr(weight, FIELDS[part])) is not None:
                scalar = self._scalars and part in ("weight_scale", "weight_zero_point")
                found[part] = tensor.detach().reshape(()) if scalar else tensor.detach()
        return found

    def _described(self, expert: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield the tensors of each projection, with words that are converted when used."""
        for name, weight, rows, layout in self._projections(expert, _stand_in):
            stored = self._stored(weight)
            words = functools.partial(_words, layout, rows)
            stored["weight_packed"] = LazyTensor(words, stored["weight_packed"])
            yield name, stored

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Add the checkpoint's tensors under the checkpoint's names."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for expert in range(self.num_experts):
            for name, stored in self._described(expert):
                for part, tensor in stored.items():
                    if isinstance(tensor, LazyTensor) and not prefix.endswith(PEFT):
                        tensor = tensor.plain()
                    destination[f"{prefix}{expert}.{name}.{part}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the checkpoint's tensors under the checkpoint's names: all of them, or none."""
        held = {
            f"{expert}.{name}.{part}": tensor
            for expert in range(self.num_experts)
            for name, stored in self._described(expert)
            for part, tensor in stored.items()
        }
        given = given_tensors(state_dict, prefix, held, missing_keys, error_msgs)
        rest = other_entries(state_dict, prefix, held)
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if given is None:
            return
        try:
            self._hold(self._loaded(given))
        except ValueError as error:
            error_msgs.append(f"{prefix}{self.names[0]}: {error}")

    def _loaded(self, given: Mapping[str, Tensor]) -> ExpertsWeight:
        """Return the experts of stored tensors, copied to the device of these."""
        gate_ups, downs = [], []
        for expert in range(self.num_experts):
            weights = []
            for name, held, _, _ in self._projections(expert, _stand_in):
                key = f"{expert}.{name}"
                parts = {part: given[f"{key}.{part}"] for part in self._stored(held)}
                shape = parts.pop("weight_shape", None)
                if shape is not None and tuple(shape.tolist()) != held.shape:
                    raise ValueError(
                        f"{key}.weight_shape must be {list(held.shape)}, got {shape.tolist()}"
                    )
                fields: dict[str, Any] = {}
                for part, tensor in parts.items():
                    like = getattr(held, FIELDS[part])
                    copied = tensor.detach().to(like.device, copy=True)
                    fields[FIELDS[part]] = copied.reshape(like.shape)
                weights.append(dataclasses.replace(held, **fields))
            gate, up, down = weights
            gate_ups.append(join_rows(gate, up))
            downs.append(down)
        return ExpertsWeight(gate_ups, downs)


def _for_all(tensor: Tensor, count: int) -> Tensor:
    """Return an empty buffer of ``count`` such tensors, each with the strides of ``tensor``."""
    return torch.empty_strided(
        (count, *tensor.shape),
        (tensor.numel(), *tensor.stride()),
        dtype=tensor.dtype,
        device=tensor.device,
    )


def _words(layout: PreparedWeight, rows: slice) -> Tensor:
    """Return the checkpoint's words of some rows, which need not be whole tiles."""
    start, stop = rows.start, rows.stop
    if start % layout.tile == 0 and (stop % layout.tile == 0 or stop == layout.out_features):
        return layout.packed_rows(start, stop)
    return layout.packed_weight().packed[rows].clone()


def _stand_in(layout: PreparedWeight) -> Tensor:
    """Return what has the shape of a layout's words, without their memory."""
    words = layout.packed_rows(0, min(layout.tile, layout.out_features))
    return words[:1].expand(layout.out_features, -1)
