"""Make PEFT put its adapters on ``Int4Linear`` and on the parameters of ``Int4Experts``.

PEFT's hook for layers of other libraries, ``LoraConfig._register_custom_module``, belongs to one
config, and is not saved with it. So that ``get_peft_model(model, LoraConfig(...))`` and
``PeftModel.from_pretrained`` need no change, the one function of PEFT that makes LoRA layers is
wrapped: for a packed layer it first calls that hook on the config. For every other layer it is what
it was. So is the function that removes adapters, after which a model without INT4 linears is
not a quantised one. The function that puts an adapter on a model first refuses ``modules_to_save``
with packed layers in them: PEFT would train copies, in which nothing can be trained. While it runs,
packed experts name their parameters, which PEFT looks for.

Source: ``LoraModel._create_new_module`` and ``LoraModel._unload_and_optionally_merge`` in
``peft/tuners/lora/model.py`` and ``peft/tuners/tuners_utils.py``, ``BaseTuner.inject_adapter`` in
the latter, and ``_set_trainable`` in ``peft/utils/other.py``, PEFT 0.17 to 0.21.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from int4_lora.integration.huggingface.dense_record import forget_quantizer
from int4_lora.integration.huggingface.int4_experts import Int4Experts
from int4_lora.integration.huggingface.int4_linear import Int4Linear
from int4_lora.integration.huggingface.peft_experts import ParamWrapper, parameters_named
from int4_lora.integration.huggingface.peft_layer import Int4LoraLinear

__all__ = ["register"]

MARK = "_int4_lora"
PACKED = (Int4Linear, Int4Experts)


def register() -> None:
    """Register ``Int4LoraLinear`` with PEFT; a second call changes nothing."""
    if hasattr(LoraModel._create_new_module, MARK):
        return
    _wrap_creation()
    _wrap_unloading()
    _wrap_injection()


def _wrap_creation() -> None:
    """Make PEFT put ``Int4LoraLinear`` on an ``Int4Linear``."""
    create = LoraModel._create_new_module

    @functools.wraps(create)
    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, Int4Experts):
            lora_config._register_custom_module({Int4Experts: ParamWrapper})
        if isinstance(base, Int4Linear):
            lora_config._register_custom_module({Int4Linear: Int4LoraLinear})
            if lora_config.fan_in_fan_out:  # PEFT does the same for a torch.nn.Linear
                warnings.warn(
                    "fan_in_fan_out is for layers that store W [in, out]; an INT4 linear does not: "
                    "it is set to False",
                    stacklevel=2,
                )
                lora_config.fan_in_fan_out = False
            if "fan_in_fan_out" in kwargs:
                kwargs["fan_in_fan_out"] = False
        return create(lora_config, adapter_name, target, **kwargs)

    setattr(create_new_module, MARK, True)
    LoraModel._create_new_module = staticmethod(create_new_module)


def _wrap_unloading() -> None:
    """Make a model that is dense after its adapters were merged one that is not quantised."""
    unload = LoraModel._unload_and_optionally_merge

    @functools.wraps(unload)
    def unload_and_optionally_merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        was_packed = _has_packed_layers(self.model)
        unloaded = unload(self, *args, **kwargs)
        if was_packed and not _has_packed_layers(self.model):
            forget_quantizer(self.model)
        return unloaded

    LoraModel._unload_and_optionally_merge = unload_and_optionally_merge


def _wrap_injection() -> None:
    """Make PEFT find packed experts' parameters, and refuse to train a copy of a packed layer."""
    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_adapter(
        self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        names = getattr(self.peft_config[adapter_name], "modules_to_save", None)
        _check_modules_to_save(model, names or ())
        with parameters_named(model):
            return inject(self, model, adapter_name, *args, **kwargs)

    BaseTuner.inject_adapter = inject_adapter


def _check_modules_to_save(model: nn.Module, endings: Iterable[str]) -> None:
    """Check that no module whose name has one of these endings is or holds a packed layer."""
    endings = tuple(endings)
    for name, module in model.named_modules():
        if not name.endswith(endings):
            continue
        for inner, layer in module.named_modules(prefix=name):
            if isinstance(layer, PACKED):
                raise ValueError(
                    f"modules_to_save: {inner.removesuffix('.base_layer')} is INT4, and its weight "
                    "cannot be trained: name it in target_modules, or experts' parameters in "
                    "target_parameters, which gives it an adapter, or load the dense model"
                )


def _has_packed_layers(model: nn.Module) -> bool:
    """Return whether a model has packed layers."""
    return any(isinstance(module, PACKED) for module in model.modules())
