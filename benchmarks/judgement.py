"""Judge results: a contender whose numbers are wrong is named, and not timed.

The judge is that of the conformance suite, with the roundings that the contender declares. It is
given some tokens and some outputs, drawn at random.

Source: ``docs/conformance.md``, "The verdict".
"""

import torch

from int4_lora.reference import LoRAStack
from int4_lora.reference.conformance import check_linear

MOST_TOKENS, MOST_OUTPUTS = 64, 512  # the most that are judged


class Judge:
    """The judge of one layer's results, with and without adapters.

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
            lora: whether the result is of the layer with adapters.
            roundings: the contender's roundings, under the names of ``check_linear``.

        Raises:
            ValueError: y has another shape or dtype than the layer's result.
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
        contenders: to prepare.
        mode: prepares a contender; a function of ``benchmarks.modes``.
        judge: a Judge of their layer.

    Returns:
        Two dicts by name: the prepared contenders whose result is right, and for the others why
        they are left out.
    """
    ready, refused = {}, {}
    for contender in contenders:
        name = contender.name
        try:
            candidate = mode(contender)
            result = candidate.run(0)
            wrong = judge(result, lora=contender.lora, roundings=contender.roundings)
        except Exception as error:  # whatever a peer raises, the others are measured
            refused[name] = reason(error)
            continue
        if wrong is None:
            ready[name] = candidate
        else:
            refused[name] = wrong
    return ready, refused


def reason(error):
    """Return an exception as one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def _sample(count, most, generator):
    return torch.randperm(count, generator=generator)[:most].sort().values
