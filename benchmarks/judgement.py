"""Whether a result is right: a contender whose numbers are wrong is named, and not timed.

A result within ``error_bound``, with the roundings that every contender may make (the weight not
rounded, the base rounded), is right. So is one that is off by little more, for kernels that round
elsewhere too, such as an adapter's first product: at most ``RMS`` of the exact result's root mean
square, and no output by more than ``WORST`` of it.

Some tokens and some outputs are compared, drawn at random: whole rows and columns of the operands.

Source: ``int4_lora.reference.error_bound``.
"""

from dataclasses import dataclass

import torch

from int4_lora import reference

RMS, WORST = 0.02, 0.2
MOST_TOKENS, MOST_OUTPUTS = 64, 512  # that are compared


@dataclass(frozen=True)
class Verdict:
    """How far a result is from the exact one.

    Args:
        rms: the error's root mean square over the exact result's.
        worst: the largest error over the exact result's root mean square.
        within_bound: whether every output is within ``error_bound``.
    """

    rms: float
    worst: float
    within_bound: bool

    @property
    def wrong(self):
        """Why the result is wrong, or None."""
        if self.within_bound or (self.rms <= RMS and self.worst <= WORST):
            return None
        off = f"{100 * self.rms:.3g} % in root mean square, {100 * self.worst:.3g} % at worst"
        return f"wrong numbers: off by {off}"


class Judge:
    """Knows what the layer's result has to be, alone and with adapters.

    Args:
        layer: the operands.
    """

    def __init__(self, layer):
        generator = torch.Generator().manual_seed(1)
        self.layer = layer
        self.tokens = _some(layer.tokens, MOST_TOKENS, generator).to(layer.device)
        self.outputs = _some(layer.rows, MOST_OUTPUTS, generator).to(layer.device)
        self.expected = {lora: self._exact_and_bound(lora) for lora in (False, True)}

    def __call__(self, y, *, lora):
        """Return how far y is from the exact result, with adapters or without.

        Raises:
            ValueError: y has another shape or dtype than the layer's result.
        """
        layer = self.layer
        shape = (layer.tokens, layer.rows)
        if tuple(y.shape) != shape or y.dtype != layer.dtype:
            found = f"{y.dtype} {list(y.shape)}"
            raise ValueError(f"the result must be {layer.dtype} {list(shape)}, got {found}")
        exact, bound = self.expected[lora]
        error = (y[self.tokens[:, None], self.outputs].double() - exact).abs()
        size = exact.square().mean().sqrt()
        return Verdict(
            rms=float(error.square().mean().sqrt() / size),
            worst=float(error.max() / size),
            within_bound=bool((error <= bound).all()),
        )

    def _exact_and_bound(self, lora):
        layer = self.layer
        weight = reference.PackedWeight(
            packed=layer.weight.packed[self.outputs],
            scale=layer.weight.scale[self.outputs],
            shape=(len(self.outputs), layer.columns),
            group_size=layer.group_size,
        )
        stack = reference.LoRAStack(
            layer.stack.a, layer.stack.b[:, self.outputs], layer.stack.scaling
        )
        adapters = (stack, layer.ids[self.tokens]) if lora else (None, None)
        x = layer.x[self.tokens]
        exact = reference.int4_lora_linear(x.double(), weight, *adapters)
        bound = reference.error_bound(x, weight, *adapters, weight_rounded=False, base_rounded=True)
        return exact, bound


def select(contenders, mode, judge):
    """Make contenders ready and run each once.

    Args:
        contenders: whom.
        mode: makes one ready, one of those of ``benchmarks.modes``.
        judge: a Judge of their layer.

    Returns:
        By name: those whose result is right, ready; verdicts of all that have a result; and why
        the others are left out.
    """
    ready, verdicts, refused = {}, {}, {}
    for one in contenders:
        try:
            candidate = mode(one)
            verdict = judge(candidate.run(0), lora=one.lora)
        except Exception as error:  # whatever a peer raises, the others are measured
            refused[one.name] = reason(error)
            continue
        verdicts[one.name] = verdict
        if verdict.wrong is None:
            ready[one.name] = candidate
        else:
            refused[one.name] = verdict.wrong
    return ready, verdicts, refused


def reason(error):
    """Return an exception in a line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def _some(count, most, generator):
    return torch.randperm(count, generator=generator)[:most].sort().values
