"""Runs of rows with one adapter each: values and gradients of the reference, and little memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from int4_lora.compiled import prepare_lora
from int4_lora.compiled.adapters.runs import add_in_runs
from int4_lora.reference import LoRASlice, expand, shrink
from support.weights import random_stack

ROWS, COLUMNS = 24, 40
IDS = torch.tensor([-1, -1, 2, 2, 2, 0, 5])  # in runs; there is no adapter 5


def exact(base, x, slices, ids):
    """Return the reference's layer in float64, slice by slice."""
    total, known = base.double(), torch.where((ids >= 0) & (ids < 3), ids, -1)
    for part in slices:
        stop = part.start + part.stack.out_features
        delta = expand(shrink(x.double(), part.stack, known), part.stack, known)
        total = torch.cat([total[:, : part.start], total[:, part.start : stop] + delta,
                           total[:, stop:]], dim=1)  # fmt: skip
    return total


def operands(seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(len(IDS), ROWS, generator=generator)
    x = torch.randn(len(IDS), COLUMNS, generator=generator)
    stacks = [
        random_stack(rows=rows, columns=COLUMNS, rank=rank, adapters=3, seed=rank)
        for rows, rank in ((8, 3), (10, 5))
    ]
    return base, x, [LoRASlice(stacks[0], 0), LoRASlice(stacks[1], 12)]


def test_values_and_gradients():
    base, x, slices = operands()
    gradients = []
    for function in (exact, lambda b, x, s, i: add_in_runs(b, x, prepare_lora(s).slices, i)):
        leaves = [base.clone().requires_grad_(), x.clone().requires_grad_()]
        parts = []
        for part in slices:
            pair = [part.stack.a.clone().requires_grad_(), part.stack.b.clone().requires_grad_()]
            leaves += pair
            parts.append(LoRASlice(type(part.stack)(*pair, part.stack.scaling), part.start))
        y = function(*leaves[:2], parts, IDS)
        gradients.append((y, *torch.autograd.grad(y.double().square().sum(), leaves)))
    for theirs, ours in zip(*gradients, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-4)


def test_rows_without_an_adapter_keep_the_base_beside_nan():
    base, x, slices = operands()
    for part in slices:
        part.stack.b[1] = torch.nan
    y = add_in_runs(base, x, prepare_lora(slices).slices, IDS)
    assert y.isfinite().all()
    assert torch.equal(y[[0, 1, 6]], base[[0, 1, 6]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_rounding(dtype):
    base, x, slices = operands()
    base, x = base.to(dtype), x.to(dtype)
    y = add_in_runs(base, x, prepare_lora(slices).slices, IDS)
    truth = exact(base, x, slices, IDS)
    assert y.dtype == dtype
    spacing = torch.finfo(dtype).eps * truth.abs()
    assert ((y.double() - truth).abs() <= spacing / 2 + 1e-5).all()


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that an operator returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_adapter_is_copied_for_a_row():
    base, x, slices = operands()
    rows, prepared = 50, prepare_lora(slices).slices
    given = base.repeat(rows, 1), x.repeat(rows, 1).requires_grad_()
    with Largest() as largest:
        add_in_runs(*given, prepared, IDS.repeat_interleave(rows)).sum().backward()
    assert largest.numel <= given[1].numel()
