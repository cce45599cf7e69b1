"""A stand-in for vLLM's kernel, for layers that none of vLLM's kernels takes.

vLLM chooses a kernel before it allocates a layer's tensors. It refuses layers that no kernel takes:
on a CPU, those of 8 bits, and those whose in_features or out_features 32 does not divide. This one
is asked last, and it takes the layers that our scheme is about to allocate. It also stands for
vLLM's kernel where the weight has an activation order, which vLLM's kernels do not know. It never
computes.

Source: vLLM's ``register_linear_kernel`` and ``choose_mp_linear_kernel``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vllm.model_executor.kernels.linear import MPLinearKernel, register_linear_kernel
from vllm.platforms import current_platform

__all__ = ["StandInKernel", "standing_in"]

_wanted: ContextVar[bool] = ContextVar("int4_lora_stand_in_kernel", default=False)
_registered = False


class StandInKernel(MPLinearKernel):
    """The kernel of layers that only ours computes."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Return no limit."""
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        """Return whether our scheme asks, and for INT4 or INT8."""
        if not _wanted.get():
            return False, "only layers of int4_lora are taken"
        if c.weight_type.size_bits not in (4, 8):
            return False, f"int4_lora takes 4 and 8 bits, not {c.weight_type.size_bits}"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse: there is nothing of vLLM to lay the weight out for."""
        raise ValueError(_nothing_computes(layer))

    def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
        """Refuse: there is nothing of vLLM to compute with."""
        raise ValueError(_nothing_computes(layer))


@contextmanager
def standing_in() -> Iterator[None]:
    """Let vLLM choose ``StandInKernel`` where it would refuse a layer."""
    global _registered
    if not _registered:
        register_linear_kernel(StandInKernel, current_platform._enum, "mp")
        _registered = True
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def _nothing_computes(layer: Any) -> str:
    reason, options = layer.int4_lora.fallback_reason, layer.int4_lora.engine.options
    way_out = (
        "leave out the option backend"
        if options.backend == "stock-base"
        else "write a dense model with int4-lora unpack, and serve it without the flag"
    )
    shape = [layer.output_size_per_partition, layer.input_size_per_partition]
    return (
        f"int4_lora: {layer.int4_lora.name} of {shape} is left to vLLM ({reason}), which has no "
        f"kernel for its bits, its shape or its activation order: {way_out}"
    )
