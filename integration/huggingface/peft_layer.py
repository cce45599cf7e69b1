"""LoRA on an ``Int4Linear``: what PEFT's own layer does, except where it would write to the weight.

- ``merge_and_unload`` gives a dense linear. PEFT's own merge, DoRA's included, runs on the weight
  in float64, and the sum is rounded once.
- ``merge_adapter`` would have to quantise again. It is refused; ``int4-lora merge`` does it.
- A batch with an adapter for each row is one call of ``int4_lora_linear``.
- Initialisations that change the base's weight are refused.

Source: ``peft/tuners/lora/layer.py``, PEFT 0.17 to 0.21.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft.tuners.lora as lora
import torch
from torch import Tensor, nn

from int4_lora.compiled import PreparedLoRA, prepare_lora
from int4_lora.integration.adapter.peft_table import changes_the_base
from int4_lora.integration.huggingface.dequantised import READ_ONLY, dense_weight
from int4_lora.integration.huggingface.hooks import carry_hooks
from int4_lora.integration.huggingface.int4_linear import Int4Linear
from int4_lora.reference import LoRAStack
from int4_lora.reference.rounding import round_once

__all__ = ["BACKEND", "Int4LoraLinear", "check_start"]

BASE = "__base__"  # PEFT's name for rows without an adapter
try:
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
except ImportError:  # before PEFT 0.21
    BACKEND: Any = None
else:
    BACKEND = ForwardOnlyQuantizationBackend("int4_lora")


class Int4LoraLinear(lora.Linear):
    """PEFT's LoRA layer on an ``Int4Linear``.

    ``keep_packed`` makes PEFT use it. To do it for one config without ``keep_packed``, call
    ``config._register_custom_module({Int4Linear: Int4LoraLinear})``.

    Args:
        base_layer: the ``Int4Linear``.
        adapter_name: the name of the first adapter.
        settings: as PEFT passes them.
    """

    quantization_backend = BACKEND
    base_layer: Any  # PEFT leaves its own attributes untyped
    lora_A: Any
    lora_B: Any
    merged_adapters: list[str]

    def update_layer(self, adapter_name: str, *args: Any, **settings: Any) -> None:
        """Add an adapter, unless its start would change the base's weight.

        Raises:
            ValueError: the adapter changes the base's weight; the message names the option.
        """
        check_start(settings.get("config"), settings)
        super().update_layer(adapter_name, *args, **settings)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge into INT4.

        Raises:
            RuntimeError: always, for a packed base.
        """
        if isinstance(self.get_base_layer(), Int4Linear):
            raise RuntimeError(READ_ONLY)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ``scaling * B A``, in float64 while the layer is merged."""
        if isinstance(self.get_base_layer(), Int4Linear):
            return super().get_delta_weight(adapter)  # type: ignore[no-any-return]
        a, b = self.lora_A[adapter].weight.double(), self.lora_B[adapter].weight.double()
        delta: Tensor = (b @ a) * self.scaling[adapter]
        return delta

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the layer without adapters: dense with them merged in, or the packed base.

        Args:
            merge: whether to merge.
            safe_merge: whether to refuse a result with NaN or infinities.
            adapter_names: the adapters to merge; None for the active ones.

        Returns:
            A ``torch.nn.Linear`` in the dtype of the model, each weight rounded once; the base if
            there is nothing to merge.

        Raises:
            ValueError: with ``safe_merge``, a merged weight is not finite.
        """
        base = self.get_base_layer()
        if not merge or not isinstance(base, Int4Linear):
            if merge:
                self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return self.get_base_layer()  # type: ignore[no-any-return]
        wide = _linear(dense_weight(base.prepared, torch.float64), base.bias)
        self.base_layer = wide.double()
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            merged = bool(self.merged_adapters)
        finally:
            self.base_layer = base
            self.merged_adapters = []
        return self._rounded(wide, base, safe=safe_merge) if merged else base

    @torch.no_grad()
    def _rounded(self, wide: nn.Linear, base: Int4Linear, *, safe: bool) -> nn.Linear:
        """Return a merged linear in the dtype of its model, in place of the packed base."""
        dtype = base.weight.dtype
        weight = round_once(wide.weight, dtype)
        bias = None if wide.bias is None else round_once(wide.bias, base.bias.dtype)
        if safe and not torch.isfinite(weight).all():
            raise ValueError(
                f"{base.name or 'the layer'}: merged weights are not finite in {dtype}"
            )
        dense = _linear(weight, bias)
        dense.train(base.training)
        carry_hooks(base, dense)
        if base.record is not None and base.name is not None:
            base.record.became_dense(base.name)
        return dense

    def _mixed_batch_forward(
        self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> Tensor:
        """Return a batch with an adapter for each row; plain LoRA as one call."""
        base = self.base_layer
        names = [name for name in dict.fromkeys(adapter_names) if name in self.lora_A]
        given = args or any(value is not None for value in kwargs.values())
        if given or not names or not self._is_one_call(base, names):
            mixed = super()._mixed_batch_forward
            return mixed(x, *args, adapter_names=adapter_names, **kwargs)  # type: ignore[no-any-return]
        index = {name: place for place, name in enumerate(names)}
        rows = torch.tensor([index.get(name, -1) for name in adapter_names], device=x.device)
        tokens = x[0].numel() // base.in_features
        ids = rows.repeat_interleave(tokens)
        result: Tensor = base.with_adapters(x, self._stack(names), ids)
        return result

    def _is_one_call(self, base: nn.Module, names: Sequence[str]) -> bool:
        """Return whether ``int4_lora_linear`` computes what PEFT's own layer would."""
        if not isinstance(base, Int4Linear) or base._forward_hooks or base._forward_pre_hooks:
            return False
        if hasattr(base, "_hf_hook"):
            return False
        weights = [side[name].weight for side in (self.lora_A, self.lora_B) for name in names]
        trains = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        return not trains and all(
            name not in self.lora_variant
            and not self.lora_bias.get(name)
            and (isinstance(drop := self.lora_dropout[name], nn.Identity) or not drop.training)
            for name in names
        )

    def _stack(self, names: Sequence[str]) -> PreparedLoRA:
        """Return adapters side by side.

        They are stacked in each call: a write to an adapter through ``.data``, as PEFT's own
        hotswap does, cannot be noticed.
        """
        dtypes = {self.lora_A[name].weight.dtype for name in names}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return prepare_lora(
            LoRAStack.stack(
                [
                    (
                        self.lora_A[name].weight.detach().to(dtype),
                        self.lora_B[name].weight.detach().to(dtype),
                        float(self.scaling[name]),
                    )
                    for name in names
                ]
            )
        )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a frozen dense linear with this weight."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def check_start(config: Any, settings: dict[str, Any]) -> None:
    """Check that adding an adapter leaves the base's weight alone.

    Args:
        config: PEFT's ``LoraConfig``, which PEFT passes since 0.19; or None.
        settings: the options themselves, as older PEFT passes them.
    """
    way = getattr(config, "init_lora_weights", settings.get("init_lora_weights", True))
    method = changes_the_base(way)
    if method is not None:
        raise ValueError(
            f"init_lora_weights = {way!r} changes the base's weights at its start ({method}), and "
            "an INT4 base cannot be changed: use True, 'gaussian', 'orthogonal', 'eva' or 'mica', "
            "or the dense model"
        )
    if getattr(config, "kasa_config", None) is not None:
        raise ValueError(
            "kasa_config changes the base's weights, and an INT4 base cannot be changed"
        )
