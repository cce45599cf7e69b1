"""LoRAStack, LoRASlice, shrink and expand."""

import pytest
import torch

from int4_lora.reference import LoRASlice, LoRAStack, expand, shrink
from int4_lora.reference.lora_stack import rows_of
from support.weights import narrow, random_stack, random_x

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
