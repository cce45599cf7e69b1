"""The gradients of one adapter, and of x through it.

With z = x A^T and g the gradient of y, of the tokens of the adapter only:

    dx = scaling (g B) A        dA = scaling (g B)^T x
    dB = scaling g^T z          dscaling = sum of (g B) z

Everything inside is summed and kept in the accumulation dtype. Other tokens are replaced by 0
before each product and after it, so that their NaN and infinities do not reach the adapter.

Source: the derivative of ``int4_lora.reference.expand`` and ``shrink``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.products import product
from int4_lora.reference.lora import accumulation_dtype

__all__ = ["Wanted", "through_adapter"]


class Wanted(NamedTuple):
    """The gradients to compute.

    Args:
        x: whether that of x.
        a: whether that of a.
        bt: whether that of bt.
        scaling: whether that of the scaling.
    """

    x: bool
    a: bool
    bt: bool
    scaling: bool

    @property
    def reads_x(self) -> bool:
        """Whether x is needed, and not only its gradient."""
        return self.a or self.bt or self.scaling


def through_adapter(
    g: Tensor, x: Tensor | None, uses: Tensor, part: PreparedSlice, wanted: Wanted
) -> tuple[Tensor, ...]:
    """Return the wanted gradients, in the order of ``Wanted``.

    Args:
        g: ``[tokens, out_features]``, the gradient of y.
        x: ``[tokens, in_features]``; None if ``wanted.reads_x`` is false.
        uses: bool ``[tokens]``, whether a token uses the adapter.
        part: a slice with a single adapter.
        wanted: which gradients to compute.

    Returns:
        The gradient of x in the accumulation dtype, the others in the dtypes of their operands;
        those of a and bt have no dimension of adapters, that of the scaling has none at all.
    """
    sums = accumulation_dtype(g)
    uses = uses.unsqueeze(1)
    its_g = torch.where(uses, g[:, part.start : part.stop], 0)
    a, bt, scaling = part.a[0], part.bt[0], part.scaling[0].to(sums)
    gz = product(its_g, bt.T, sums)  # [tokens, rank]
    gradients = []
    if wanted.x:
        gradients.append(torch.where(uses, scaling * (gz @ a.to(sums)), 0))
    if x is None:
        return tuple(gradients)
    its_x = torch.where(uses, x, 0)
    if wanted.a:
        gradients.append((scaling * (gz.T @ its_x.to(sums))).to(a.dtype))
    if wanted.bt or wanted.scaling:
        z = product(its_x, a.T, sums)  # [tokens, rank]
        if wanted.bt:
            gradients.append((scaling * (z.T @ its_g.to(sums))).to(bt.dtype))
        if wanted.scaling:
            gradients.append(_trace(gz.T @ z).to(part.scaling.dtype))
    return tuple(gradients)


def _trace(square: Tensor) -> Tensor:
    """Return the sum of the diagonal.

    The sum of gz * z is computed so, since Inductor guards the number of tokens that it sums over.
    """
    place = torch.arange(square.shape[0], device=square.device)
    return torch.where(place == place.unsqueeze(1), square, 0).sum()
