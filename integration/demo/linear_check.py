"""Judge every output of every quantised linear of a model.

The oracle gives the verdict. The exact result does not come from the reference, which is under test
here: compressed-tensors decompresses the weight, and the adapters are applied row by row by PEFT's
definition.

Source: ``docs/conformance.md``, "The verdict".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from int4_lora.integration.adapter.adapter import Adapter
from int4_lora.integration.checkpoint.compressed_tensors import decompress
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.demo.models import ReferenceLinear
from int4_lora.reference import error_bound
from int4_lora.reference.conformance.judging.answers import Answer
from int4_lora.reference.conformance.judging.verdict import error_of, judge

__all__ = ["LinearCheck"]


class LinearCheck:
    """Forward hooks that judge the outputs of every ``ReferenceLinear`` of a model.

    Args:
        checkpoint: the open checkpoint, whose weights compressed-tensors decompresses.
        adapters: the adapters; the first row of a batch has none, and row i has the i-th.
    """

    def __init__(self, checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> None:
        self.checkpoint, self.adapters = checkpoint, adapters
        self.elements = 0
        self.unbounded = 0
        self.worst = 0.0
        self.finding: str | None = None

    def watch(self, model: nn.Module) -> None:
        """Register the hook on every quantised linear of ``model``."""
        for name, module in model.named_modules():
            if isinstance(module, ReferenceLinear):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str):  # type: ignore[no-untyped-def]  # torch's type for it is private
        def hook(module: ReferenceLinear, args: tuple[Tensor], output: Tensor) -> None:
            x = args[0]
            bound = error_bound(*module.operands(x)).reshape(output.shape)
            exact = self._exact(name, x, module.bias)
            self.judge(name, output, Answer(exact, x.dtype, bound, (exact,)))

        return hook

    def _exact(self, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the exact y of x ``[rows, tokens, in_features]`` in float64."""
        wide = x.to(torch.float64)
        y = linear(wide, decompress(self.checkpoint, name).to(torch.float64))
        for row, adapter in enumerate(self.adapters, start=1):
            if name in adapter.modules:
                module = adapter.modules[name]
                h = linear(wide[row], module.a.to(torch.float64))
                y[row] += module.scaling * linear(h, module.b.to(torch.float64))
        return y if bias is None else y + bias.to(torch.float64)

    def judge(self, name: str, output: Tensor, answer: Answer) -> None:
        """Judge one call; count its outputs, those without a bound, and the worst error / bound.

        Args:
            name: the linear's name.
            output: the linear's result.
            answer: the exact result and its bound.
        """
        bounded = answer.bound.isfinite()
        error = error_of(output, answer)
        ratios = torch.where(error == 0, 0.0, error / answer.bound)[bounded]
        self.elements += output.numel()
        self.unbounded += int((~bounded).sum())
        if ratios.numel():
            self.worst = max(self.worst, ratios.max().item())
        finding = judge(output, answer, equal=False, yardstick=None)
        if finding is not None and self.finding is None:
            self.finding = f"{name}: {finding.message}"
