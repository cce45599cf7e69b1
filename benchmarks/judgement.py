"""Judge results, so that only contenders with right numbers are timed.

The conformance suite's ``check_linear`` judges a random sample of the tokens and outputs, given the
roundings that the contender declares.

Source: ``docs/conformance.md``, "The verdict".
"""

import torch

from int4_lora.reference import LoRAStack
from int4_lora.reference.conformance import check_linear

MOST_TOKENS, MOST_OUTPUTS = 64, 512  # the most to judge


class Judge:
    """A judge of one layer's results, with and without adapters.

    Args:
        layer: the operands.
    """

    def __init__(self, layer):
        generator = torch.Generator().manual_seed(1)
        self.layer = layer
        self.tokens = _sample(layer.tokens, MOST_TOKENS, generator).to(layer.device)
        self.outputs = _sample(layer.rows, MOST_OUTPUTS, generator).to(layer.device)
        self.weight = layer.weight.rows(self.outputs)
        self.stack = LoRAStack(layer.stack.a, layer.stack.b[:, self.outputs], layer.stack.scaling)

    def __call__(self, y, *, lora, roundings):
        """Return why y is wrong, or None.

        Args:
            y: the result.
            lora: whether the layer was computed with adapters.
            roundings: the contender's roundings, as keyword arguments of ``check_linear``.

        Raises:
            ValueError: y does not have the shape and dtype of the layer's result.
        """
        layer = self.layer
        shape = (layer.tokens, layer.rows)
        if tuple(y.shape) != shape or y.dtype != layer.dtype:
            got = f"{y.dtype} {list(y.shape)}"
            raise ValueError(f"the result must be {layer.dtype} {list(shape)}, got {got}")
        adapters = (self.stack, layer.ids[self.tokens]) if lora else (None, None)
        judged = y[self.tokens[:, None], self.outputs]
        finding = check_linear(judged, layer.x[self.tokens], self.weight, *adapters, **roundings)
        return None if finding is None else f"wrong numbers: {finding.message}"


def select(contenders, mode, judge):
    """Prepare contenders, run each once, and judge the result.

    Args:
        contenders: the contenders.
        mode: a function of ``benchmarks.modes``, which prepares a contender.
        judge: the Judge of their layer.

    Returns:
        Two dicts by name: the prepared contenders whose result is right, and the reasons why the
        others are left out.
    """
    ready, refused = {}, {}
    for contender in contenders:
        name = contender.name
        try:
            candidate = mode(contender)
            result = candidate.run(0)
            wrong = judge(result, lora=contender.lora, roundings=contender.roundings)
        except Exception as error:  # the other contenders are still measured
            refused[name] = reason(error)
            continue
        if wrong is None:
            ready[name] = candidate
        else:
            refused[name] = wrong
    return ready, refused


def reason(error):
    """Return an exception's type and message in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def _sample(count, most, generator):
    return torch.randperm(count, generator=generator)[:most].sort().values
