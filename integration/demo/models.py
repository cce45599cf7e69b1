"""One INT4 checkpoint as a transformers model, in two ways.

``peft_model`` is the truth's way: dense weights as compressed-tensors decompresses them, PEFT
for the adapters, one adapter at a time. ``reference_model`` keeps the packed weights, computes
every quantised linear with ``int4_lora.reference``, and takes a mixed batch.

Source: transformers' ``modeling_llama.py`` for what surrounds the linears.
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

from int4_lora.integration.adapter import Adapter
from int4_lora.integration.adapter_stack import stack_adapters
from int4_lora.integration.checkpoint import Checkpoint
from int4_lora.integration.upstream import decompress
from int4_lora.reference import LoRAStack, PackedWeight, int4_lora_linear

__all__ = ["Float64Inside", "ReferenceLinear", "RowAdapters", "peft_model", "reference_model"]


class RowAdapters:
    """Which adapter each row of the batch uses; shared by all linears of a model.

    Args:
        ids: int64 ``[rows]``, -1 for none.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def of_tokens(self, tokens: int) -> Tensor:
        """Return the id of each token: int64 ``[tokens]``, rows being equally long."""
        return self.ids.repeat_interleave(tokens // len(self.ids))


class ReferenceLinear(nn.Module):
    """A linear layer computed by ``int4_lora.reference`` from packed weights.

    Args:
        weight: the packed base weight.
        lora: the adapters of this layer, or None.
        rows: which adapter each row of the batch uses.
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
        """Apply the layer to x ``[..., in_features]``; returns ``[..., out_features]``."""
        return int4_lora_linear(*self.operands(x)).reshape(*x.shape[:-1], -1)


class Float64Inside(TorchFunctionMode):
    """Inside, a conversion to float32 goes to float64.

    transformers computes norms, rotary angles and softmax in float32 whatever the model's dtype.
    A float64 model is a truth only where it does not.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` with every float32 among its arguments replaced by float64."""
        if func is Tensor.float:
            return args[0].to(torch.float64)

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        named = {key: wide(value) for key, value in (kwargs or {}).items()}
        return func(*(wide(value) for value in args), **named)


def dense_model(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """Return the model in eager attention, its weights decompressed by compressed-tensors.

    Args:
        checkpoint: an open checkpoint.
        dtype: the dtype of the weights and the activations.

    Raises:
        ValueError: transformers' model does not have the tensors of the checkpoint.
    """
    config: Any = AutoConfig.from_pretrained(checkpoint.path)
    del config.quantization_config
    quantised = set(checkpoint.modules())
    state = {
        name: checkpoint.tensor(name)
        for name in checkpoint.tensors
        if name.rpartition(".")[0] not in quantised or name.endswith(".bias")
    }
    state |= {f"{name}.weight": decompress(checkpoint, name) for name in quantised}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    try:
        found = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or model._tied_weights_keys or ())
    missing = [name for name in found.missing_keys if name not in tied]
    for wrong, rule in ((missing, "lacks"), (found.unexpected_keys, "holds but the model lacks")):
        if wrong:
            raise ValueError(f"{checkpoint.path}: the checkpoint {rule} {wrong[0]}")
    whole: nn.Module = model.to(dtype) if dtype == torch.float64 else model  # rotary buffers too
    return whole.eval()


def peft_model(checkpoint: Checkpoint, adapters: Mapping[str, Path], dtype: torch.dtype) -> Any:
    """Return the dense model with every adapter loaded by PEFT; ``set_adapter`` chooses one.

    Args:
        checkpoint: an open checkpoint.
        adapters: the folder of each adapter, by name.
        dtype: the dtype of the base; in float64 the adapters are float64 too, otherwise PEFT's
            default holds.
    """
    model: Any = dense_model(checkpoint, dtype)
    for name, folder in adapters.items():
        if isinstance(model, peft.PeftModel):
            model.load_adapter(folder, adapter_name=name)
        else:
            model = peft.PeftModel.from_pretrained(model, folder, adapter_name=name)
    return (model.to(dtype) if dtype == torch.float64 else model).eval()


def reference_model(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], rows: RowAdapters, dtype: torch.dtype
) -> nn.Module:
    """Return the model with every quantised linear replaced by a ``ReferenceLinear``.

    Args:
        checkpoint: an open checkpoint.
        adapters: the adapters; an id is a position in this list.
        rows: which adapter each row of a batch uses.
        dtype: the dtype of the activations and of what is not quantised.

    Raises:
        ValueError: a quantised module is no linear layer, or an adapter does not fit it.
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
