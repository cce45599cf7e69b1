"""The gradients of the layer in float64, and how large the sums are that they consist of."""

import torch

from int4_lora.reference import LoRAStack, dequantize, int4_lora_linear

NAMES = ("x", "a", "b", "scaling")
UNIT = 2.0**-24  # of float32


def leaves_of(x, stack, dtype=None):
    """Return x, a, b and scaling as leaves that require gradients, in ``dtype`` if it is given."""
    tensors = [x] if stack is None else [x, stack.a, stack.b, stack.scaling]
    return [one.detach().to(dtype or one.dtype).clone().requires_grad_() for one in tensors]


def of_reference(x, weight, stack, ids, g, dtype=None):
    """Return the reference's gradients, eager, in the dtype of the operands or in ``dtype``."""
    x, *rest = leaves_of(x, stack, dtype)
    lora = LoRAStack(*rest) if rest else None
    y = int4_lora_linear(x, weight, lora, ids, None)
    return torch.autograd.grad(y, [x, *rest], g.to(y.dtype))


def magnitudes(x, weight, stack, ids, g):
    """Return the gradients of factors replaced by their magnitudes: the formulas written out."""
    x, g = x.double().abs(), g.double().abs()
    of_x = g @ dequantize(weight, torch.float64).abs()
    if stack is None:
        return [of_x]
    of_a, of_b = (torch.zeros(one.shape, dtype=torch.float64) for one in (stack.a, stack.b))
    of_scaling = torch.zeros(stack.adapters, dtype=torch.float64)
    for token, adapter in enumerate(ids.tolist()):
        if not 0 <= adapter < stack.adapters:
            continue
        a, b = stack.a[adapter].double().abs(), stack.b[adapter].double().abs()
        scaling = stack.scaling[adapter].double().abs()
        z, gz = a @ x[token], g[token] @ b
        of_x[token] += scaling * (gz @ a)
        of_a[adapter] += scaling * torch.outer(gz, x[token])
        of_b[adapter] += scaling * torch.outer(g[token], z)
        of_scaling[adapter] += gz @ z
    return [of_x, of_a, of_b, of_scaling]


def bounds(x, weight, stack, ids, g):
    """Return gamma_n of the sums in float32 times their magnitudes, for each gradient.

    n counts the products of the longest chain of sums, and a rounding for each of these: the
    scaling, the product with it, the sum of base and adapter, the result.
    """
    outputs, inputs = weight.shape
    rank, tokens = (0, x.shape[0]) if stack is None else (stack.rank, x.shape[0])
    lengths = (outputs + rank, outputs + tokens, inputs + tokens, outputs + inputs + rank + tokens)
    sizes = magnitudes(x, weight, stack, ids, g)
    gammas = [(n + 4) * UNIT / (1 - (n + 4) * UNIT) for n in lengths]
    return [gamma * size for gamma, size in zip(gammas, sizes, strict=False)]


def rms(found, exact):
    """Return the root of the mean square of the error."""
    return (found.double() - exact).square().mean().sqrt()
