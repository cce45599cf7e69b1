"""Load one INT4 checkpoint as a transformers model, in two ways.

``peft_model`` gives the truth: dense weights decompressed by compressed-tensors, and PEFT for the
adapters, one at a time. ``reference_model`` keeps the packed weights, computes every quantised
linear with ``int4_lora.reference``, and takes a mixed batch.

Source: transformers' ``modeling_llama.py`` for the model around the linears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from int4_lora.integration.adapter.adapter import Adapter
from int4_lora.integration.adapter.stack import stack_adapters
from int4_lora.integration.checkpoint.compressed_tensors import decompress, decompress_module
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.reference import LoRAStack, PackedWeight, int4_lora_linear

__all__ = [
    "Float64Inside",
    "ReferenceLinear",
    "RowAdapters",
    "peft_model",
    "peft_name",
    "reference_model",
]


class RowAdapters:
    """The adapter of each row of the batch, shared by all linears of a model.

    Args:
        ids: int64 ``[rows]``, -1 for none.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def of_tokens(self, tokens: int) -> Tensor:
        """Return the adapter id of each token: int64 ``[tokens]``; all rows are equally long."""
        return self.ids.repeat_interleave(tokens // len(self.ids))


class ReferenceLinear(nn.Module):
    """A linear layer that ``int4_lora.reference`` computes from packed weights.

    Args:
        weight: the packed base weight.
        lora: the adapters of this layer, or None.
        rows: the adapter of each row of the batch.
        bias: ``[out_features]`` or None.
    """

    def __init__(
        self, weight: PackedWeight, lora: LoRAStack | None, rows: RowAdapters, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.weight, self.lora, self.rows = weight, lora, rows
        self.register_buffer("bias", bias)
        self.bias: Tensor | None

    def operands(self, x: Tensor) -> tuple[Any, ...]:
        """Return the arguments of ``int4_lora_linear`` for x ``[..., in_features]``."""
        tokens = x.reshape(-1, x.shape[-1])
        ids = None if self.lora is None else self.rows.of_tokens(tokens.shape[0])
        return tokens, self.weight, self.lora, ids, self.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x ``[..., in_features]`` and return ``[..., out_features]``."""
        return int4_lora_linear(*self.operands(x)).reshape(*x.shape[:-1], -1)


class Float64Inside(TorchFunctionMode):
    """A context in which float64 replaces every ``torch.float32`` argument.

    transformers computes norms, rotary angles and softmax in float32 whatever the model's dtype,
    so without this context a float64 model would not be accurate to float64.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` with float64 in place of every ``torch.float32`` among its arguments."""
        if func is Tensor.float:
            return args[0].to(torch.float64)

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        named = {key: wide(value) for key, value in (kwargs or {}).items()}
        return func(*(wide(value) for value in args), **named)


def dense_model(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """Return the model with eager attention and weights decompressed by compressed-tensors.

    Args:
        checkpoint: an open checkpoint.
        dtype: the dtype of weights and activations.

    Raises:
        ValueError: transformers cannot make a model from the config, or its model has other tensors
            than the checkpoint.
    """
    file = checkpoint.path / "config.json"
    try:
        config: Any = AutoConfig.from_pretrained(checkpoint.path)
        config.__dict__.pop("quantization_config", None)
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="eager"
        )
    except Exception as error:  # its model code can raise any exception
        detail = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{file}: transformers cannot build this model: {detail}") from error
    model.tie_weights()
    _fill(model, checkpoint)
    complete: nn.Module = model.to(dtype) if dtype == torch.float64 else model  # rotary buffers too
    return complete.eval()


@torch.no_grad()
def _fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy every tensor of the checkpoint into the model, one at a time."""
    places = model.state_dict()
    filled = set()
    quantised = set(checkpoint.modules())
    dense = [
        name
        for name in checkpoint.tensors
        if name.rpartition(".")[0] not in quantised or name.endswith(".bias")
    ]
    for name in [*dense, *(f"{module}.weight" for module in checkpoint.modules())]:
        if name not in places:
            raise ValueError(f"{checkpoint.path}: holds {name}, which the model does not have")
        module = name.removesuffix(".weight")
        tensor = _dense(checkpoint, module) if module in quantised else checkpoint.tensor(name)
        if tensor.shape != places[name].shape:
            raise ValueError(
                f"{checkpoint.path}: {name} must be {list(places[name].shape)} for the model of "
                f"config.json, got {list(tensor.shape)}"
            )
        places[name].copy_(tensor)
        filled.add(places[name].data_ptr())
    for name, place in places.items():
        if place.data_ptr() not in filled:  # tied weights share storage
            raise ValueError(f"{checkpoint.path}: lacks {name}, which the model has")


def _dense(checkpoint: Checkpoint, module: str) -> Tensor:
    """Return the weight that compressed-tensors decompresses."""
    if checkpoint.is_float4(module):
        return decompress_module(checkpoint, module)
    return decompress(checkpoint, module)


def peft_model(checkpoint: Checkpoint, adapters: Sequence[Path], dtype: torch.dtype) -> Any:
    """Return the dense model with every adapter loaded by PEFT under its ``peft_name``.

    Args:
        checkpoint: an open checkpoint.
        adapters: the folder of each adapter.
        dtype: the dtype of the base; adapters are float64 in a float64 model, otherwise they have
            PEFT's default dtype.
    """
    model: Any = dense_model(checkpoint, dtype)
    for index, folder in enumerate(adapters):
        name = peft_name(index)
        if isinstance(model, peft.PeftModel):
            model.load_adapter(folder, adapter_name=name)
        else:
            model = peft.PeftModel.from_pretrained(model, folder, adapter_name=name)
    return (model.to(dtype) if dtype == torch.float64 else model).eval()


def peft_name(index: int) -> str:
    """Return the name of an adapter in PEFT, which must be a valid module name."""
    return f"adapter_{index}"


def reference_model(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], rows: RowAdapters, dtype: torch.dtype
) -> nn.Module:
    """Return the model with every quantised linear replaced by a ``ReferenceLinear``.

    Args:
        checkpoint: an open checkpoint.
        adapters: the adapters; an id is a position in this list.
        rows: the adapter of each row of a batch.
        dtype: the dtype of activations and of tensors that are not quantised.

    Raises:
        ValueError: a quantised module is not a linear layer, or an adapter does not fit it.
    """
    model = dense_model(checkpoint, dtype)
    for name in checkpoint.modules():
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{checkpoint.path}: {name} is no linear layer of the model")
        weight = checkpoint.packed_weight(name)
        lora = stack_adapters(adapters, name, weight.in_features, weight.out_features)
        bias = None if linear.bias is None else linear.bias.data
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, ReferenceLinear(weight, lora, rows, bias))
    return model
