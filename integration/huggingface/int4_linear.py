"""A linear layer whose quantised weight stays packed, in place of a model's ``torch.nn.Linear``.

It holds the checkpoint's tensors once, in the layout of ``int4_lora.compiled.prepare``, as frozen
buffers. They move between devices and are never cast; ``state_dict`` gives the checkpoint's names
and tensors, bit for bit. Within a layer of PEFT the words are converted to the checkpoint's order
only if they are used: PEFT saves an adapter by ``state_dict``, of which it takes the adapter.

Source: ``torch.nn.Linear``; ``docs/format.md`` for the names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from int4_lora.compiled import PreparedLoRA, PreparedWeight, int4_lora_linear, prepare
from int4_lora.integration.checkpoint.open import PARTS
from int4_lora.integration.huggingface.dense_record import DenseRecord
from int4_lora.integration.huggingface.dequantised import (
    READ_ONLY,
    DequantisedWeight,
    dense_weight,
)
from int4_lora.integration.huggingface.layout_tensors import moved, named_tensors, with_tensors
from int4_lora.integration.huggingface.lazy_tensor import LazyTensor
from int4_lora.integration.huggingface.registration import register
from int4_lora.integration.huggingface.stored_tensors import given_tensors, other_entries
from int4_lora.reference import Float4Weight
from int4_lora.reference.float4_weight import BaseWeight, check_weight, dense_dtype

__all__ = ["Int4Linear"]

FIELDS = {  # the parts that hold a field of PackedWeight or Float4Weight
    "weight_packed": "packed",
    "weight_scale": "scale",
    "weight_zero_point": "zero_point",
    "weight_g_idx": "g_idx",
    "weight_global_scale": "global_scale",
}
PEFT = "base_layer."  # where each layer of PEFT holds the layer that it adapts


class Int4Linear(nn.Linear):
    """``y = x W^T + bias`` with a packed weight of INT4, INT8 or FP4, which is frozen.

    ``weight`` returns the dense weight as a read-only tensor that is computed where it is used.

    Args:
        weight: the checkpoint's tensors, on the device that computes.
        bias: ``[out_features]``, or None. A parameter stays that parameter.
        dtype: the dtype of ``weight``, such as the dtype of the model; None for the scales' dtype,
            or bfloat16 for FP4.
        shape_dtype: the dtype in which the checkpoint stores ``weight_shape``; None if it does not.
            No checkpoint stores that of FP4.
        scalars: whether the checkpoint stores the one scale of a tensor with the shape [].

    Raises:
        TypeError: ``weight`` is neither a PackedWeight nor a Float4Weight.
        ValueError: bias has another shape.

    Example:
        >>> from int4_lora.reference import quantize
        >>> layer = Int4Linear(quantize(torch.randn(32, 256), group_size=128))
        >>> layer(torch.randn(2, 5, 256)).shape
        torch.Size([2, 5, 32])
        >>> sorted(layer.state_dict())
        ['weight_packed', 'weight_scale', 'weight_shape']
    """

    name: str | None = None
    record: DenseRecord | None = None  # of the model; keep_packed sets both

    _layout: PreparedWeight
    _device_type: str

    def __init__(
        self,
        weight: BaseWeight,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        shape_dtype: torch.dtype | None = torch.int64,
        scalars: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a dense weight
        check_weight(weight)
        self.in_features, self.out_features = weight.in_features, weight.out_features
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"bias must be [{self.out_features}], got {list(bias.shape)}")
        self._dtype = dtype or dense_dtype(weight)
        self._shape_dtype = None if isinstance(weight, Float4Weight) else shape_dtype
        self._scalars = scalars
        self._is_hf_initialized = True  # transformers must not initialise it
        self._hold(weight)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight, read-only: see ``DequantisedWeight``."""
        if torch.compiler.is_compiling():
            return dense_weight(self.prepared, self._dtype)
        return DequantisedWeight(self.prepared, self._dtype)

    @weight.setter
    def weight(self, value: object) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise RuntimeError(READ_ONLY)

    @property
    def prepared(self) -> PreparedWeight:
        """The weight in the layout that computes, made of the current buffers.

        Whoever moves a model may replace its buffers. A layout may suit one kind of device only, so
        the weight is laid out again after it moved to another.
        """
        layout = self._layout
        for name, tensor in self._names.items():
            if self._buffers[name] is not tensor:
                break
        else:
            return layout
        layout = with_tensors(layout, {name: self.get_buffer(name) for name in self._names})
        if layout.device.type not in (self._device_type, "meta"):
            self._hold(layout.packed_weight())
        else:
            self._take(layout)
        return self._layout

    @property
    def packed_names(self) -> tuple[str, ...]:
        """The names of the buffers that hold the weight."""
        return tuple(self._names)

    def packed_weight(self) -> BaseWeight:
        """Return the checkpoint's tensors, bit for bit."""
        return self.prepared.packed_weight()

    def forward(self, input: Tensor) -> Tensor:
        """Return ``x W^T + bias`` of ``[..., in_features]``, with gradients for x and bias."""
        return self.with_adapters(input)

    def with_adapters(
        self, x: Tensor, lora: PreparedLoRA | None = None, adapter_ids: Tensor | None = None
    ) -> Tensor:
        """Return the layer with an adapter for each token: ``int4_lora_linear`` of its weight.

        Args:
            x: ``[..., in_features]``.
            lora: returned by ``prepare_lora``, or None.
            adapter_ids: int32 or int64, one for each token of x in order, -1 for none; or None.

        Returns:
            ``[..., out_features]`` in the dtype of x, or under autocast in that of autocast.
        """
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        rows = x.flatten(0, -2) if x.ndim > 2 else x.unsqueeze(0) if x.ndim < 2 else x
        y = int4_lora_linear(rows, self.prepared, lora, adapter_ids, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer as torch prints it."""
        layout = type(self._layout).__name__.removesuffix("Weight")
        return f"{super().extra_repr()}, layout={layout}"

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; refuse one in place of the packed weight."""
        if name == "weight":
            raise RuntimeError(READ_ONLY)
        super().register_parameter(name, param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy, or of a pickle that another process may have written."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.record is not None:  # as keep_packed did
            register()

    def _hold(self, weight: BaseWeight) -> None:
        """Lay out a weight for its device and hold it."""
        self._device_type = weight.packed.device.type
        for name in getattr(self, "_names", ()):
            del self._buffers[name]
        plain = {name: tensor.detach() for name, tensor in named_tensors(weight).items()}
        layout = prepare(with_tensors(weight, plain))
        for name, tensor in named_tensors(layout).items():
            self.register_buffer(name, tensor, persistent=False)
        self._take(layout)

    def _take(self, layout: PreparedWeight) -> None:
        """Take a layout, whose tensors are the buffers."""
        self._layout, self._names = layout, named_tensors(layout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        """Apply ``fn`` as torch does, but move the weight without a cast."""
        held = {name: self._buffers.pop(name) for name in self._names}
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

    def _stored(self, weight: BaseWeight) -> dict[str, Tensor]:
        """Return the tensors as the checkpoint stores them, by the last part of their names."""
        found: dict[str, Tensor] = {}
        for part in (*PARTS, "weight_global_scale"):
            if part == "weight_shape":
                if self._shape_dtype is not None:
                    device = weight.packed.device
                    found[part] = torch.tensor(weight.shape, dtype=self._shape_dtype, device=device)
            elif (tensor := getattr(weight, FIELDS[part], None)) is not None:
                scalar = self._scalars and tensor.ndim == 1 and part != "weight_g_idx"
                found[part] = tensor.detach().reshape(()) if scalar else tensor.detach()
        return found

    def _described(self) -> BaseWeight:
        """Return the checkpoint's tensors with stand-ins for the codes, which cost a conversion."""
        layout = self.prepared
        words = layout.packed_rows(0, min(layout.tile, self.out_features))
        return layout.with_words(words[:1].expand(self.out_features, -1))

    def _lazy_words(self, like: Tensor) -> LazyTensor:
        """Return the checkpoint's words, converted at their first use."""
        layout = self.prepared
        return LazyTensor(lambda: layout.packed_weight().packed, like)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Add the checkpoint's tensors under the checkpoint's names."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        within_peft = prefix.endswith(PEFT)
        stored = self._stored(self._described() if within_peft else self.packed_weight())
        if within_peft:
            stored["weight_packed"] = self._lazy_words(stored["weight_packed"])
        for part, tensor in stored.items():
            destination[prefix + part] = tensor

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
        held = self._stored(self._described())
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
            error_msgs.append(f"{prefix}weight_packed: {error}")

    def _loaded(self, parts: Mapping[str, Tensor]) -> BaseWeight:
        """Return the weight of stored tensors, copied to the device of this layer."""
        held = self._described()
        shape = parts.get("weight_shape")
        if shape is not None and tuple(shape.tolist()) != held.shape:
            raise ValueError(f"weight_shape must be {list(held.shape)}, got {shape.tolist()}")
        fields: dict[str, Any] = {
            name: parts[part].detach().to(held.packed.device, copy=True).reshape(like.shape)
            for part, name in FIELDS.items()
            if (like := getattr(held, name, None)) is not None
        }
        return dataclasses.replace(held, **fields)
