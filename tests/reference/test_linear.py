"""int4_linear and int4_lora_linear: truth, batches, slices, gradients, torch.compile, refusals."""

import dataclasses
import itertools
import unittest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parameterized import parameterized

from int4_lora.reference import (
    LoRASlice,
    LoRAStack,
    dequantize,
    error_bound,
    int4_linear,
    int4_lora_linear,
)
from support import scalar
from support.weights import every_format, narrow, random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

WEIGHT = random_weight(symmetric=False)
STACK = random_stack()
X = random_x()
IDS = torch.tensor([0, -1, 2, 1, 2, -1])
BIAS = torch.linspace(-1, 1, 13)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def truth(x, weight, stack=None, ids=None, bias=None):
    """The definition, one token at a time, from the scalar opinion's weight, in float64."""
    dense = torch.from_numpy(scalar.dequantize(weight))
    rows = []
    for token, row in enumerate(x.double()):
        y = dense @ row
        if stack is not None and ids[token] >= 0:
            a, b = stack.a[ids[token]].double(), stack.b[ids[token]].double()
            y = y + stack.scaling[ids[token]] * (b @ (a @ row))
        rows.append(y if bias is None else y + bias.double())
    return torch.stack(rows)


class EveryFormat(unittest.TestCase):
    @parameterized.expand(every_format())
    def test_float64_is_the_truth(self, name, arguments):
        weight = random_weight(**arguments)
        y = int4_lora_linear(X.double(), weight, STACK, IDS, BIAS)
        expected = truth(X, weight, STACK, IDS, BIAS)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)

    @parameterized.expand(every_format())
    def test_every_dtype_of_x_is_within_the_bound(self, name, arguments):
        weight = random_weight(**arguments)
        for dtype in FLOATS:
            x = X.to(dtype)
            y = int4_lora_linear(x, weight, STACK, IDS, BIAS)
            assert y.dtype == dtype
            error = (y.double() - truth(x, weight, STACK, IDS, BIAS)).abs()
            assert (error <= error_bound(x, weight, STACK, IDS, BIAS)).all()


def test_no_adapters_is_the_base():
    base = int4_linear(X, WEIGHT, BIAS)
    assert torch.equal(int4_lora_linear(X, WEIGHT, bias=BIAS), base)
    assert torch.equal(int4_lora_linear(X, WEIGHT, STACK, torch.full((6,), -1), BIAS), base)
    assert torch.equal(int4_lora_linear(X, WEIGHT, [], bias=BIAS), base)
    mixed = int4_lora_linear(X, WEIGHT, STACK, IDS, BIAS)
    assert torch.equal(mixed[IDS == -1], base[IDS == -1])
    assert (mixed[IDS != -1] != base[IDS != -1]).all()


@given(st.lists(st.integers(-1, 2), min_size=0, max_size=9), st.sampled_from(FLOATS))
def test_a_batch_equals_its_rows_one_at_a_time(ids, dtype):
    x, ids = random_x(len(ids), dtype=dtype), torch.tensor(ids, dtype=torch.int64)
    batch = int4_lora_linear(x, WEIGHT, STACK, ids, BIAS)
    assert batch.shape == (len(ids), 13)
    for token in range(len(ids)):
        single = slice(token, token + 1)
        alone = int4_lora_linear(x[single], WEIGHT, STACK, ids[single], BIAS)
        bound = error_bound(x[single], WEIGHT, STACK, ids[single], BIAS)
        assert ((batch[single].double() - alone.double()).abs() <= 2 * bound).all()


def test_ids_of_both_int_dtypes_and_any_memory_order():
    expected = int4_lora_linear(X, WEIGHT, STACK, IDS)
    assert torch.equal(int4_lora_linear(X, WEIGHT, STACK, IDS.int()), expected)
    strided = X.T.contiguous().T
    torch.testing.assert_close(int4_lora_linear(strided, WEIGHT, STACK, IDS), expected)


def test_one_hot_x_reads_the_weight_back():
    x = torch.eye(44)
    assert torch.equal(int4_linear(x, WEIGHT), dequantize(WEIGHT).T)


def test_operands_are_not_modified():
    operands = [X, BIAS, IDS, WEIGHT.packed, WEIGHT.scale, WEIGHT.zero_point, STACK.a, STACK.b]
    before = [operand.clone() for operand in operands]
    int4_lora_linear(X, WEIGHT, STACK, IDS, BIAS)
    assert all(torch.equal(after, other) for after, other in zip(operands, before, strict=True))


def test_slices_write_their_own_outputs():
    first, second = narrow(STACK, 5), narrow(random_stack(rank=2, seed=7), 6)
    y = int4_lora_linear(X, WEIGHT, [LoRASlice(second, 7), LoRASlice(first, 1)], IDS)
    base = int4_linear(X, WEIGHT)
    assert torch.equal(y[:, [0, 6]], base[:, [0, 6]])
    wide = torch.zeros(3, 13, 4)
    wide[:, 1:6] = first.b
    alone = int4_lora_linear(X, WEIGHT, LoRAStack(first.a, wide, first.scaling), IDS)
    torch.testing.assert_close(y[:, 1:6], alone[:, 1:6])
    wide = torch.zeros(3, 13, 2)
    wide[:, 7:] = second.b
    alone = int4_lora_linear(X, WEIGHT, LoRAStack(second.a, wide, second.scaling), IDS)
    torch.testing.assert_close(y[:, 7:], alone[:, 7:])


def test_special_values_follow_ieee():
    x = X.clone()
    x[0, 0], x[1, 0] = float("nan"), float("inf")
    y = int4_lora_linear(x, WEIGHT, STACK, IDS)
    assert y[0].isnan().all()
    assert not y[1].isfinite().any()
    assert y[2:].isfinite().all()
    big = int4_linear(torch.full((1, 44), 65504.0, dtype=torch.float16), random_weight())
    assert big.isinf().any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_have_the_dtype_of_their_operand(dtype):
    x = X.to(dtype, copy=True).requires_grad_()
    stack = random_stack(dtype=torch.float32 if dtype != torch.float64 else dtype)
    a, b = stack.a.requires_grad_(), stack.b.requires_grad_()
    int4_lora_linear(x, WEIGHT, LoRAStack(a, b, stack.scaling), IDS).sum().backward()
    assert [t.grad.dtype for t in (x, a, b)] == [t.dtype for t in (x, a, b)]
    assert all(t.grad.isfinite().all() for t in (x, a, b))


def test_gradients_are_right():
    x = X.double().requires_grad_()
    pairs = [(STACK.a.double().requires_grad_(), STACK.b.double().requires_grad_())]
    other = random_stack(rank=2, seed=7)
    pairs.append((other.a.double().requires_grad_(), narrow(other, 4).b.double().requires_grad_()))

    def whole(x, a, b):
        return int4_lora_linear(x, WEIGHT, LoRAStack(a, b, STACK.scaling), IDS, BIAS.double())

    def sliced(x, a, b):
        return int4_lora_linear(x, WEIGHT, [LoRASlice(LoRAStack(a, b, STACK.scaling), 3)], IDS)

    for function, pair in zip((whole, sliced), pairs, strict=True):
        assert torch.autograd.gradcheck(function, (x, *pair))


def test_autocast_changes_nothing():
    expected = int4_lora_linear(X, WEIGHT, STACK, IDS, BIAS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(int4_lora_linear(X, WEIGHT, STACK, IDS, BIAS), expected)
        assert torch.equal(int4_linear(X, WEIGHT), int4_linear(X, WEIGHT))


def test_gradients_of_one_adapter_and_token_reach_no_other():
    a, b, x = STACK.a.clone(), STACK.b.clone(), X.clone()
    a[1], x[1, 0] = float("nan"), float("inf")  # an adapter and a base row nobody else may see
    stack = LoRAStack(a.requires_grad_(), b.requires_grad_(), STACK.scaling)
    x.requires_grad_()
    ids = torch.tensor([0, -1, 2, 1, 2, -1])
    y = int4_lora_linear(x, WEIGHT, stack, ids)
    y[[0, 2, 4, 5]].sum().backward()
    assert x.grad[[0, 2, 4, 5]].isfinite().all()
    assert a.grad[[0, 2]].isfinite().all()
    assert b.grad[[0, 2]].isfinite().all()


def replace_stack(**fields):
    return dataclasses.replace(STACK, **fields)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "weight must be a PackedWeight", lambda: int4_linear(X, WEIGHT.packed)),
        (TypeError, "x must be .* got int64", lambda: int4_linear(X.long(), WEIGHT)),
        (TypeError, "x must be a tensor .* got None", lambda: int4_linear(None, WEIGHT)),
        (ValueError, r"x must be .* got \[6, 43\]", lambda: int4_linear(X[:, 1:], WEIGHT)),
        (ValueError, r"x must be .* got \[1, 6, 44\]", lambda: int4_linear(X[None], WEIGHT)),
        (ValueError, r"bias must be .* got \[12\]", lambda: int4_linear(X, WEIGHT, BIAS[1:])),
        (TypeError, "bias must be .* got int64", lambda: int4_linear(X, WEIGHT, BIAS.long())),
        (TypeError, "bias must not be float64 where x is float32",
         lambda: int4_linear(X, WEIGHT, BIAS.double())),
        (ValueError, "one device: x is on meta, weight is on cpu",
         lambda: int4_linear(X.to("meta"), WEIGHT)),
        (ValueError, "one device: weight is on cpu, lora is on meta",
         lambda: int4_lora_linear(X, WEIGHT, STACK.to("meta"), IDS)),
        (ValueError, "one device: x is on cpu, bias is on meta",
         lambda: int4_linear(X, WEIGHT, BIAS.to("meta"))),
        (TypeError, "bias must be a tensor .* got list", lambda: int4_linear(X, WEIGHT, [1.0])),
        (TypeError, "lora must be a LoRAStack or LoRASlices, got str",
         lambda: int4_lora_linear(X, WEIGHT, "", IDS)),
        (ValueError, "one device: x is on cpu, adapter_ids is on meta",
         lambda: int4_lora_linear(X, WEIGHT, None, IDS.to("meta"))),
        (ValueError, "adapter_ids must be given with lora, got None",
         lambda: int4_lora_linear(X, WEIGHT, STACK)),
        (ValueError, r"adapter_ids must be in \[-1, 0\) .* got 2",
         lambda: int4_lora_linear(X, WEIGHT, None, IDS)),
        (ValueError, r"adapter_ids must be in \[-1, 3\) .* got 3",
         lambda: int4_lora_linear(X, WEIGHT, STACK, IDS + 1)),
        (ValueError, r"adapter_ids must be in \[-1, 3\) .* got -2",
         lambda: int4_lora_linear(X, WEIGHT, STACK, IDS - 1)),
        (TypeError, "adapter_ids must be a tensor .* got list",
         lambda: int4_lora_linear(X, WEIGHT, STACK, IDS.tolist())),
        (TypeError, "lora must be a LoRAStack or LoRASlices, got Tensor",
         lambda: int4_lora_linear(X, WEIGHT, STACK.a, IDS)),
        (TypeError, r"lora\[0\] must be a LoRASlice, got LoRAStack",
         lambda: int4_lora_linear(X, WEIGHT, [STACK], IDS)),
        (TypeError, "must not be float64 where x is float32",
         lambda: int4_lora_linear(X, WEIGHT, random_stack(dtype=torch.float64), IDS)),
        (ValueError, "lora must have the in_features of weight, 44",
         lambda: int4_lora_linear(X, WEIGHT, replace_stack(a=STACK.a[..., 1:]), IDS)),
        (ValueError, "lora must have the out_features of weight, 13",
         lambda: int4_lora_linear(X, WEIGHT, narrow(STACK, 12), IDS)),
        (ValueError, r"outputs of \[0, 13\), got \[9, 14\)",
         lambda: int4_lora_linear(X, WEIGHT, [LoRASlice(narrow(STACK, 5), 9)], IDS)),
        (ValueError, r"slices must not overlap: \[4, 12\) and \[0, 5\)",
         lambda: int4_lora_linear(
             X, WEIGHT, [LoRASlice(narrow(STACK, 8), 4), LoRASlice(narrow(STACK, 5), 0)], IDS)),
        (ValueError, r"slices must not overlap: \[0, 5\) and \[4, 8\)",
         lambda: int4_lora_linear(
             X, WEIGHT,
             [LoRASlice(narrow(STACK, 5), 0),
              LoRASlice(narrow(STACK, 4), 9),
              LoRASlice(narrow(STACK, 4), 4)], IDS)),
        (ValueError, r"as many adapters: lora\[0\] has 3, lora\[1\] has 2",
         lambda: int4_lora_linear(
             X, WEIGHT,
             [LoRASlice(narrow(STACK, 4), 0),
              LoRASlice(narrow(random_stack(adapters=2), 4), 4)], IDS)),
    ],
)  # fmt: skip
def test_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_the_cases_of_this_file_tell_groups_and_adapters_apart():
    scales = WEIGHT.scale
    for one, other in itertools.combinations(range(4), 2):
        assert (scales[:, one] != scales[:, other]).all()
    assert len(set(STACK.scaling.tolist())) == STACK.adapters
