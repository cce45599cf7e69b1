"""Every output of every quantised linear, held against ``error_bound``.

The exact result is not computed by the reference, which is what is tested here: the weight is
compressed-tensors' own, and the adapters are applied row by row as PEFT defines them.

Source: ``docs/numerics.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from int4_lora.integration.adapter.read import Adapter
from int4_lora.integration.checkpoint.compressed_tensors import decompress
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.demo.models import ReferenceLinear
from int4_lora.reference import error_bound

__all__ = ["BoundCheck"]


class BoundCheck:
    """Forward hooks on all ``ReferenceLinear`` of a model that collect errors over their bounds.

    Args:
        checkpoint: the open checkpoint, for compressed-tensors' weights.
        adapters: the adapters; the rows of a batch are base, then each of them.
    """

    def __init__(self, checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> None:
        self.checkpoint, self.adapters = checkpoint, adapters
        self.elements = 0
        self.unbounded = 0
        self.worst = 0.0

    def watch(self, model: nn.Module) -> None:
        """Register the hook on every quantised linear of ``model``."""
        for name, module in model.named_modules():
            if isinstance(module, ReferenceLinear):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str):  # type: ignore[no-untyped-def]  # what torch wants is private
        def hook(module: ReferenceLinear, args: tuple[Tensor], output: Tensor) -> None:
            x = args[0]
            bound = error_bound(*module.operands(x)).reshape(output.shape)
            self.add(output, self._exact(name, x, module.bias), bound)

        return hook

    def _exact(self, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return y of x ``[rows, tokens, in_features]`` in float64."""
        wide = x.to(torch.float64)
        y = linear(wide, decompress(self.checkpoint, name).to(torch.float64))
        for row, adapter in enumerate(self.adapters, start=1):
            if name in adapter.modules:
                part = adapter.modules[name]
                h = linear(wide[row], part.a.to(torch.float64))
                y[row] += part.scaling * linear(h, part.b.to(torch.float64))
        return y if bias is None else y + bias.to(torch.float64)

    def add(self, output: Tensor, exact: Tensor, bound: Tensor) -> None:
        """Count outputs, those without a bound, and the worst error over its bound.

        Args:
            output: what was computed, any float dtype.
            exact: float64, of the same shape.
            bound: float64, of the same shape.
        """
        bounded = bound.isfinite()
        error = (output.to(torch.float64) - exact).abs()
        ratios = torch.where(error == 0, 0.0, error / bound)[bounded]
        self.elements += output.numel()
        self.unbounded += output.numel() - ratios.numel()
        if ratios.numel():
            largest = ratios.max().item()  # NaN if any is
            self.worst = largest if largest != largest else max(self.worst, largest)
