"""Whether a result is right: a contender whose numbers are wrong is named, and not timed.

The judge is that of the conformance suite, at the roundings that the contender declares. Some
tokens and some outputs are judged, drawn at random: whole rows and columns of the operands.

Source: ``docs/conformance.md``, "The verdict".
"""

import torch

from int4_lora.reference import LoRAStack
from int4_lora.reference.conformance import check_linear

MOST_TOKENS, MOST_OUTPUTS = 64, 512  # that are judged


class Judge:
    """The judge of one layer's results, alone and with adapters.

    Args:
        layer: the operands.
    """

    def __init__(self, layer):
        generator = torch.Generator().manual_seed(1)
        self.layer = layer
        self.tokens = _some(layer.tokens, MOST_TOKENS, generator).to(layer.device)
        self.outputs = _some(layer.rows, MOST_OUTPUTS, generator).to(layer.device)
        self.weight = layer.weight.rows(self.outputs)
        self.stack = LoRAStack(layer.stack.a, layer.stack.b[:, self.outputs], layer.stack.scaling)

    def __call__(self, y, *, lora, roundings):
        """Return why y is wrong, or None.

        Args:
            y: the result.
            lora: whether it is the layer with adapters.
            roundings: those that the contender makes, by the names of ``check_linear``.

        Raises:
            ValueError: y has another shape or dtype than the layer's result.
        """
        layer = self.layer
        shape = (layer.tokens, layer.rows)
        if tuple(y.shape) != shape or y.dtype != layer.dtype:
            found = f"{y.dtype} {list(y.shape)}"
            raise ValueError(f"the result must be {layer.dtype} {list(shape)}, got {found}")
        adapters = (self.stack, layer.ids[self.tokens]) if lora else (None, None)
        judged = y[self.tokens[:, None], self.outputs]
        finding = check_linear(judged, layer.x[self.tokens], self.weight, *adapters, **roundings)
        return None if finding is None else f"wrong numbers: {finding.message}"


def select(contenders, mode, judge):
    """Make contenders ready and run each once.

    Args:
        contenders: whom.
        mode: makes one ready, one of those of ``benchmarks.modes``.
        judge: a Judge of their layer.

    Returns:
        By name: those whose result is right, ready; and why the others are left out.
    """
    ready, refused = {}, {}
    for one in contenders:
        try:
            candidate = mode(one)
            wrong = judge(candidate.run(0), lora=one.lora, roundings=one.roundings)
        except Exception as error:  # whatever a peer raises, the others are measured
            refused[one.name] = reason(error)
            continue
        if wrong is None:
            ready[one.name] = candidate
        else:
            refused[one.name] = wrong
    return ready, refused


def reason(error):
    """Return an exception in a line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def _some(count, most, generator):
    return torch.randperm(count, generator=generator)[:most].sort().values
