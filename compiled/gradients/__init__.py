"""Gradients of the layer: of x through the base, and of the adapters, each a compiled graph.

Source: the derivative of ``int4_lora.reference.int4_lora_linear``.
"""

from int4_lora.compiled.gradients.node import differentiable, needs_gradients

__all__ = ["differentiable", "needs_gradients"]
