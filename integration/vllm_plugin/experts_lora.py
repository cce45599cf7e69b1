"""vLLM's LoRA layers of experts, whose slots ``int4_lora.compiled`` reads.

Each is vLLM's own class, which loads adapters, stacks them by expert and splits them over ranks,
and gives them to the kernel of the experts. Its own products need a GPU. B is held transposed, as
our kernels read it, and vLLM gets a view of it.

Source: vLLM's ``vllm/lora/layers/fused_moe.py``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import vllm.lora.layers as vllm_lora_layers
from torch import Tensor, nn

from int4_lora.integration.vllm_plugin.contract import EXPERTS_LORA_CLASSES
from int4_lora.integration.vllm_plugin.served_experts import ServedExperts, expert_slots

__all__ = ["EXPERTS_LAYERS", "Int4ExpertsLoRALayer"]


class Int4ExpertsLoRALayer:
    """The base class that is put before vLLM's LoRA layers of experts."""

    base_layer: Any
    w13_lora_a_stacked: tuple[Tensor, ...]
    w13_lora_b_stacked: tuple[Tensor, ...]
    w2_lora_a_stacked: tuple[Tensor, ...]
    w2_lora_b_stacked: tuple[Tensor, ...]

    @classmethod
    def can_replace_layer(
        cls,
        source_layer: Any,
        lora_config: Any,
        packed_modules_list: list[str],
        model_config: Any = None,
    ) -> bool:
        """Return whether a layer has experts that we compute, of a kind that vLLM's class takes."""
        served = getattr(getattr(source_layer, "routed_experts", None), "int4_lora", None)
        return (
            isinstance(served, ServedExperts)
            and served.int4
            and super().can_replace_layer(  # type: ignore[misc]
                source_layer=source_layer,
                lora_config=lora_config,
                packed_modules_list=packed_modules_list,
                model_config=model_config,
            )
        )

    @property
    def served(self) -> ServedExperts:
        """The plug-in's state of the experts."""
        served: ServedExperts = self.base_layer.routed_experts.int4_lora
        return served

    def _create_lora_b_weights(self, max_loras: int, lora_config: Any) -> None:
        super()._create_lora_b_weights(max_loras, lora_config)  # type: ignore[misc]
        self.w13_lora_b_stacked = tuple(map(_transposed, self.w13_lora_b_stacked))
        self.w2_lora_b_stacked = tuple(map(_transposed, self.w2_lora_b_stacked))

    def create_lora_weights(
        self, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> None:
        """Make the slots of the adapters; compile and check everything that will run.

        Raises:
            ValueError: vLLM is to hold an A or a B that all experts share once.
        """
        if getattr(lora_config, "enable_moe_shared_loras", False):
            raise ValueError(
                "int4_lora does not take pairs that experts share: leave out "
                "--enable-moe-shared-loras, and store a pair for each expert"
            )
        super().create_lora_weights(max_loras, lora_config, model_config)  # type: ignore[misc]
        pairs = zip(self.w13_lora_a_stacked, self.w13_lora_b_stacked, strict=True)
        down = self.w2_lora_a_stacked[0], self.w2_lora_b_stacked[0]
        self.served.read_slots(expert_slots(list(pairs), down))

    def set_lora(self, index: int, lora_a: list[Tensor], lora_b: list[Tensor]) -> None:
        """Put an adapter in a slot."""
        slots, engine = self.served.slots, self.served.engine
        assert slots is not None
        finite = engine.finite.of(lora_b, self.w2_lora_b_stacked[0].dtype)
        if not finite:
            slots.note_finite(index, False)
        try:
            super().set_lora(index, lora_a, lora_b)  # type: ignore[misc]
        except BaseException:
            slots.note_unknown(index)
            raise
        slots.note(index, max(a.shape[1] for a in lora_a))
        slots.note_finite(index, finite)
        routed = self.base_layer.routed_experts
        names = routed.ckpt_gate_proj_name, routed.ckpt_up_proj_name, routed.ckpt_down_proj_name
        engine.warn_outside_targets(self.served, names)

    def reset_lora(self, index: int) -> None:
        """Empty a slot, unless it is."""
        slots = self.served.slots
        assert slots is not None
        if slots.rank(index):
            super().reset_lora(index)  # type: ignore[misc]
            slots.note(index, 0)
            slots.note_finite(index, True)

    def share_router(self) -> None:
        """Let the base layer route with the router that has adapters.

        Where the base layer holds the router, vLLM (0.30 to 0.32) gives the one with adapters to
        this layer, which does not route.
        """
        router = getattr(self, "_modules", {}).get("gate")
        if isinstance(router, nn.Module) and "gate" in self.base_layer._modules:
            self.base_layer.gate = router


def _transposed(b: Tensor) -> Tensor:
    """Return a view for B ``[slots, experts, outputs, rank]`` of ``[..., rank, outputs]``."""
    slots, experts, outputs, rank = b.shape
    return b.new_zeros(slots, experts, rank, outputs).transpose(2, 3)


def _our_class(name: str) -> type:
    """Return our class for one of vLLM's LoRA layers, by its name.

    vLLM asks for its classes by name when it makes the adapters of its warm-up.
    """
    bases = (Int4ExpertsLoRALayer, getattr(vllm_lora_layers, name))
    return type(name, bases, {"__module__": __name__})


EXPERTS_LAYERS = tuple(_our_class(name) for name in EXPERTS_LORA_CLASSES)
