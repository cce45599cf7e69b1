"""LoRAStack, LoRASlice, shrink and expand."""

import pytest
import torch

from int4_lora.reference import (
    LoRASlice,
    LoRAStack,
    PackedLoRAStack,
    PackedWeight,
    error_bound,
    expand,
    int4_lora_linear,
    merge,
    quantize,
    shrink,
)
from int4_lora.reference.lora_stack import rows_of
from support.weights import narrow, random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

STACK = random_stack()
X = random_x()
IDS = torch.tensor([0, -1, 2, 1, 2, -1])


def by_hand(x, lora, ids):
    """One token and one rank at a time, in float64."""
    delta = torch.zeros(x.shape[0], lora.out_features, dtype=torch.float64)
    for token, adapter in enumerate(ids.tolist()):
        for r in range(lora.rank if adapter >= 0 else 0):
            h = sum(
                p * q for p, q in zip(lora.a[adapter, r].tolist(), x[token].tolist(), strict=True)
            )
            for n in range(lora.out_features):
                delta[token, n] += float(lora.scaling[adapter]) * float(lora.b[adapter, n, r]) * h
    return delta


def test_the_delta_by_hand():
    x = X.double()
    delta = expand(shrink(x, STACK, IDS), STACK, IDS)
    torch.testing.assert_close(delta, by_hand(x, STACK, IDS), rtol=1e-12, atol=1e-12)
    assert (delta[IDS == -1] == 0).all()
    assert (delta[IDS != -1] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_kept_wide(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    h = shrink(X.to(dtype), STACK, IDS)
    assert h.dtype == wide
    assert h.shape == (6, 4)
    assert expand(h, STACK, IDS).dtype == wide


def test_smaller_ranks_are_padded_with_zeros():
    assert STACK.rank == 4
    assert (STACK.a[1, 3:] == 0).all()
    assert (STACK.b[1, :, 3:] == 0).all()
    assert (STACK.a[1, :3] != 0).all()


def test_scalings_are_kept_in_float64():
    assert STACK.scaling.dtype == torch.float64
    assert STACK.scaling[0].item() == 2 / 3


def test_a_scaling_of_sixteen_bits_is_widened():
    half = LoRAStack(STACK.a, STACK.b, torch.tensor([0.5, 0.25, 2.0], dtype=torch.float16))
    wide = LoRAStack(STACK.a, STACK.b, half.scaling.double())
    h = shrink(X, half, IDS)
    assert torch.equal(expand(h, half, IDS), expand(h, wide, IDS))


def test_the_order_of_adapters_does_not_matter():
    order = torch.tensor([2, 0, 1])
    moved = LoRAStack(STACK.a[order], STACK.b[order], STACK.scaling[order])
    ids = torch.where(IDS == -1, -1, torch.argsort(order)[IDS.clamp(min=0)])
    assert torch.equal(shrink(X, moved, ids), shrink(X, STACK, IDS))
    h = shrink(X, STACK, IDS)
    assert torch.equal(expand(h, moved, ids), expand(h, STACK, IDS))


def test_an_adapter_of_nan_touches_its_own_tokens_only():
    a = STACK.a.clone()
    a[1] = float("nan")
    poisoned = LoRAStack(a, STACK.b, STACK.scaling)
    delta = expand(shrink(X, poisoned, IDS), poisoned, IDS)
    assert torch.equal(delta.isnan().any(dim=1), IDS == 1)


def test_zero_tokens_and_zero_adapters():
    none = torch.empty(0, dtype=torch.int64)
    assert expand(shrink(X[:0], STACK, none), STACK, none).shape == (0, 13)
    empty = LoRAStack(STACK.a[:0], STACK.b[:0], STACK.scaling[:0])
    assert (shrink(X, empty, torch.full((6,), -1)) == 0).all()


def test_to_moves_everything():
    moved = STACK.to("meta")
    assert {moved.a.device.type, moved.b.device.type, moved.scaling.device.type} == {"meta"}


@pytest.mark.parametrize(
    "index",
    [
        [0, 1, 4, 5, 6, 11, 12],
        [12, 6, 6, 0, 5, 2, 13],
        [3, 4, 11],
        [],
    ],
)
def test_rows_of_slices_write_what_the_slices_write_there(index):
    slices = [LoRASlice(narrow(STACK, 3), 5), LoRASlice(narrow(STACK, 3, 3), 0)]
    chosen = torch.tensor(index, dtype=torch.int64)

    def written(slices, outputs):
        delta = torch.zeros(len(X), outputs, dtype=torch.float64)
        for part in slices:
            h = shrink(X.double(), part.stack, IDS)
            delta[:, part.start : part.stop] += expand(h, part.stack, IDS)
        return delta

    expected = written(slices, 14)[:, chosen]
    actual = written(rows_of(slices, chosen), len(index))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_rows_that_no_slice_writes_have_none():
    assert rows_of([LoRASlice(STACK, 2)], torch.tensor([0, 1, 15, 20])) == []


A, B = torch.ones(2, 8), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "adapters must not be empty", lambda: LoRAStack.stack([])),
        (ValueError, r"b of adapter 0 must be .* \[4, 2\], got \[4, 3\]",
         lambda: LoRAStack.stack([(A, torch.ones(4, 3), 1.0)])),
        (ValueError, r"a of adapter 1 must be .* got \[2, 9\]",
         lambda: LoRAStack.stack([(A, B, 1.0), (torch.ones(2, 9), B, 1.0)])),
        (ValueError, r"b of adapter 1 must be .* got \[5, 2\]",
         lambda: LoRAStack.stack([(A, B, 1.0), (A, torch.ones(5, 2), 1.0)])),
        (TypeError, "b of adapter 0 must be float32, got float16",
         lambda: LoRAStack.stack([(A, B.half(), 1.0)])),
        (TypeError, "a of adapter 1 must be float32, got bfloat16",
         lambda: LoRAStack.stack([(A, B, 1.0), (A.bfloat16(), B.bfloat16(), 1.0)])),
        (TypeError, "a of adapter 0 must be .* got int64",
         lambda: LoRAStack.stack([(A.long(), B.long(), 1.0)])),
        (TypeError, "scaling of adapter 0 must be a number, got str",
         lambda: LoRAStack.stack([(A, B, "1")])),
        (ValueError, "one device: a of adapter 0 is on cpu, a of adapter 1 is on meta",
         lambda: LoRAStack.stack([(A, B, 1.0), (A.to("meta"), B.to("meta"), 1.0)])),
        (ValueError, "a must have rank and in_features",
         lambda: LoRAStack(torch.ones(1, 0, 8), torch.ones(1, 4, 0), torch.ones(1))),
        (ValueError, r"a must be .* got \[2, 8\]", lambda: LoRAStack(A, B, torch.ones(1))),
        (ValueError, r"b must be .* got \[1, 4, 3\]",
         lambda: LoRAStack(A[None], torch.ones(1, 4, 3), torch.ones(1))),
        (ValueError, r"scaling must be .* got \[2\]",
         lambda: LoRAStack(A[None], B[None], torch.ones(2))),
        (TypeError, "scaling must be .* got int64",
         lambda: LoRAStack(A[None], B[None], torch.ones(1).long())),
        (TypeError, "adapters must be .a, b, scaling. triples, got NoneType",
         lambda: LoRAStack.stack(None)),
        (TypeError, r"adapter 0 must be \(a, b, scaling\), got tuple",
         lambda: LoRAStack.stack([(A, B)])),
        (TypeError, r"adapter 0 must be \(a, b, scaling\), got int", lambda: LoRAStack.stack([5])),
        (ValueError, "scaling of adapter 0 must fit float64",
         lambda: LoRAStack.stack([(A, B, 10**400)])),
        (ValueError, "a of adapter 1 must have a rank of 1 or more",
         lambda: LoRAStack.stack([(A, B, 1.0), (A[:0], B[:, :0], 1.0)])),
        (ValueError, "one device: a of adapter 0 is on cpu, b of adapter 1 is on meta",
         lambda: LoRAStack.stack([(A, B, 1.0), (A, B.to("meta"), 1.0)])),
        (TypeError, "lora must be a LoRAStack, got NoneType", lambda: shrink(X, None, IDS)),
        (TypeError, "lora must be a LoRAStack, got list", lambda: expand(X, [STACK], IDS)),
        (TypeError, "adapter_ids must be a tensor .* got list",
         lambda: shrink(X, STACK, IDS.tolist())),
        (TypeError, "device must be a torch.device or its name, got dtype",
         lambda: STACK.to(torch.float16)),
        (ValueError, "device must be one that torch knows, got 'foo'", lambda: STACK.to("foo")),
        (TypeError, "stack must be a LoRAStack", lambda: LoRASlice(A, 0)),
        (ValueError, "start must not be negative, got -1", lambda: LoRASlice(STACK, -1)),
        (TypeError, "start must be an int", lambda: LoRASlice(STACK, 0.0)),
        (ValueError, r"x must be .* got \[6, 43\]", lambda: shrink(X[:, 1:], STACK, IDS)),
        (ValueError, r"h must be .* got \[6, 44\]", lambda: expand(X, STACK, IDS)),
        (TypeError, "x must be .* got int64", lambda: shrink(X.long(), STACK, IDS)),
        (TypeError, "must not be float64 where x is float32",
         lambda: shrink(X, random_stack(dtype=torch.float64), IDS)),
        (ValueError, r"adapter_ids must be in \[-1, 3\) .* got 3",
         lambda: shrink(X, STACK, IDS + 1)),
        (ValueError, r"adapter_ids must be in \[-1, 3\) .* got -2",
         lambda: shrink(X, STACK, IDS - 1)),
        (ValueError, r"adapter_ids must be \[tokens\] = \[6\], got \[5\]",
         lambda: shrink(X, STACK, IDS[1:])),
        (TypeError, "adapter_ids must be int32 or int64, got float32",
         lambda: shrink(X, STACK, IDS.float())),
        (ValueError, "one device: x is on cpu, adapter_ids is on meta",
         lambda: shrink(X, STACK, torch.full((6,), -1, device="meta"))),
    ],
)  # fmt: skip
def test_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_the_codes_of_an_adapter_by_hand():
    a = torch.tensor([[7.5, -3.0, 1.0, 0.0]])
    b = torch.tensor([[3.75], [-0.75]])
    packed = LoRAStack.stack([(a, b, 0.5), (2 * a, -b, 2.0)]).quantized()
    assert packed.a.packed.tolist() == [[0x895F], [0x895F]]  # 7, -3, 1, 0, each plus 8
    assert packed.a.scale.tolist() == [[1.0], [2.0]]
    assert packed.b.packed.tolist() == [[0xF], [0x0], [0x0], [0xF]]  # 7, -8; -8, 7
    assert torch.equal(packed.b.scale, torch.tensor([[0.5], [0.1], [0.5], [0.1]]))
    dense = packed.dequantize()
    assert dense.a.tolist() == [[[7.0, -3.0, 1.0, 0.0]], [[14.0, -6.0, 2.0, 0.0]]]
    assert torch.equal(dense.b[:, :, 0], torch.tensor([[3.5, -0.8], [-4.0, 0.7]]))
    assert dense.scaling.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_adapter_is_quantised_matrix_by_matrix(symmetric):
    packed = STACK.quantized(11, symmetric=symmetric, scale_dtype=torch.bfloat16)
    assert (packed.adapters, packed.rank) == (STACK.adapters, STACK.rank)
    assert (packed.in_features, packed.out_features) == (STACK.in_features, STACK.out_features)
    dense = packed.dequantize()
    for adapter in range(STACK.adapters):
        settings = {"symmetric": symmetric, "scale_dtype": torch.bfloat16}
        a = quantize(STACK.a[adapter], group_size=11, **settings)
        b = quantize(STACK.b[adapter], group_size=None, **settings)
        rows = slice(adapter * STACK.rank, (adapter + 1) * STACK.rank)
        assert torch.equal(packed.a.packed[rows], a.packed)
        assert torch.equal(packed.a.scale[rows], a.scale)
        assert (dense.a[adapter] - STACK.a[adapter]).abs().max() < a.scale.max()
        assert (dense.b[adapter] - STACK.b[adapter]).abs().max() < b.scale.max()
    assert (dense.a[1, 3:] == 0).all()  # ranks that were padded stay zero
    assert (dense.b[1, :, 3:] == 0).all()


def test_what_is_computed_with_packed_adapters_is_computed_with_their_values():
    weight, packed = random_weight(), STACK.quantized()
    dense = packed.dequantize()
    y = int4_lora_linear(X, weight, packed, IDS)
    assert torch.equal(y, int4_lora_linear(X, weight, dense, IDS))
    assert not torch.equal(y, int4_lora_linear(X, weight, STACK, IDS))
    assert torch.equal(merge(weight, packed, 2), merge(weight, dense, 2))
    bounds = [error_bound(X, weight, lora, IDS) for lora in (packed, dense)]
    assert torch.equal(*bounds)
    moved = packed.to("meta")
    assert moved.a.packed.is_meta
    assert moved.scaling.is_meta
    assert packed.nbytes == packed.a.nbytes + packed.b.nbytes + 3 * 8


def packed_of(rows, columns):
    return quantize(torch.ones(rows, columns), group_size=None)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"a": torch.ones(2, 8)}, TypeError, "a must be a PackedWeight, got Tensor"),
        ({"b": None}, TypeError, "b must be a PackedWeight, got NoneType"),
        ({"scaling": torch.ones(2).int()}, TypeError, "scaling must be float16"),
        ({"scaling": torch.ones(2, 1)}, ValueError, "scaling must be"),
        ({"scaling": torch.ones(0)}, ValueError, "a must be .* with 0 adapters of rank 3"),
        ({"a": packed_of(5, 8)}, ValueError, r"2 adapters of rank 3, got \(5, 8\)"),
        ({"b": packed_of(7, 3)}, ValueError, r"b must be .* with 2 adapters, got \(7, 3\)"),
        (
            {"a": PackedWeight(packed_of(6, 8).packed, torch.ones(6, 1).half(), (6, 8))},
            TypeError,
            "b.scale must be float16, got float32",
        ),
    ],
)
def test_packed_adapters_are_checked(fields, error, message):
    right = {"a": packed_of(6, 8), "b": packed_of(8, 3), "scaling": torch.ones(2)}
    assert PackedLoRAStack(**right).out_features == 4
    with pytest.raises(error, match=message):
        PackedLoRAStack(**{**right, **fields})


@pytest.mark.parametrize(
    ("group_size", "error", "message"),
    [
        (12, ValueError, "group_size must divide the columns of a, 44, or be larger, got 12; 4 do"),
        (0, ValueError, "columns of a, 44, or be larger, got 0"),
        (8.0, TypeError, "group_size must be an int, got float"),
        (True, TypeError, "group_size must be an int, got bool"),
    ],
)
def test_groups_that_do_not_fit_an_adapter_are_refused(group_size, error, message):
    with pytest.raises(error, match=message):
        STACK.quantized(group_size)


def test_a_packed_adapter_of_another_layer_is_refused():
    packed = random_stack(rows=12).quantized()
    with pytest.raises(ValueError, match=r"out_features of weight, 13, got b of \[3, 12, 4\]"):
        int4_lora_linear(X, random_weight(), packed, IDS)
