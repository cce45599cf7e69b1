"""The compiled layer: checks of its arguments, its graphs, and its use within other graphs."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import pytest
import torch

from int4_lora.compiled import (
    formulation_for,
    int4_linear,
    int4_lora_linear,
    layouts,
    prepare,
    prepare_lora,
)
from int4_lora.compiled.graphs import cache as graphs
from int4_lora.compiled.graphs.cache import bucket_of
from int4_lora.reference import LoRASlice, LoRAStack, error_bound
from int4_lora.reference import int4_lora_linear as reference
from support.weights import narrow, random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

ROWS, COLUMNS = 80, 128  # a block of 64 rows, and a rest
SHAPE = {"rows": ROWS, "columns": COLUMNS}
WEIGHT = random_weight(**SHAPE)
STACK = random_stack(**SHAPE)
LORA = prepare_lora(STACK)
BIAS = torch.linspace(-1, 1, ROWS)


LIMIT = "recompile_limit"  # of torch._dynamo.config


def ids_of(tokens):
    return torch.arange(tokens) % 4 - 1


def check(x, weight, lora, ids, bias, *, layout, y=None):
    """Check a result against the reference's bound for the declared roundings."""
    prepared = prepare(weight, layout=layout)
    adapters = None if lora is None else prepare_lora(lora)
    if y is None:
        y = int4_lora_linear(x, prepared, adapters, ids, bias)
    used = formulation_for(prepared, x.dtype, x.shape[0])
    exact = reference(x.double(), weight, lora, ids, bias)
    bound = error_bound(
        x, weight, lora, ids, bias,
        weight_rounded=used.weight_rounded, base_rounded=used.base_rounded,
    )  # fmt: skip
    assert y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= bound).all(), (layout, used.name, x.dtype, x.shape)


@pytest.mark.parametrize(
    ("layout", "dtype", "form"),
    [
        ("int4pack", torch.bfloat16, {}),
        ("interleaved", torch.float32, {}),
        ("interleaved", torch.float16, {}),
        ("int8", torch.bfloat16, {"bits": 8, "layout": "channel"}),
        ("int8", torch.bfloat16, {"bits": 8, "symmetric": False}),
        ("checkpoint", torch.bfloat16, {}),
    ],
)
def test_every_layout_in_every_bucket(layout, dtype, form):
    weight = random_weight(**SHAPE, dtype=dtype, **form)
    for tokens in (1, 5, 40):
        x = random_x(tokens, COLUMNS, dtype)
        check(x, weight, STACK, ids_of(tokens), BIAS, layout=layout)
    check(x, weight, None, None, None, layout=layout)


def test_asymmetric_weights_and_slices():
    weight = random_weight(**SHAPE, symmetric=False)
    slices = [LoRASlice(narrow(STACK, 16), 0), LoRASlice(narrow(STACK, 24, 16), 24)]
    for tokens in (1, 3, 17, 25):
        x = random_x(tokens, COLUMNS)
        check(x, weight, slices, ids_of(tokens), None, layout="interleaved")


def test_no_tokens():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(0, COLUMNS, dtype=dtype)
        y = int4_lora_linear(x, prepare(WEIGHT), LORA, ids_of(0), BIAS)
        assert y.shape == (0, ROWS)
        assert y.dtype == dtype


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_buckets_hold_every_number_of_tokens(device):
    buckets = [bucket_of(tokens, device) for tokens in range(1, 9000)]
    assert buckets[0] == (1, 1)
    for tokens, (first, last) in enumerate(buckets, start=1):
        assert first <= tokens <= last
    for (_, last), (first, _) in itertools.pairwise(dict.fromkeys(buckets)):
        assert first == last + 1


@pytest.mark.parametrize("layout", ["int4pack", "interleaved"])
def test_nothing_is_compiled_again_after_the_first_call_of_each_bucket(layout):
    weight, lora = prepare(random_weight(**SHAPE, seed=7), layout=layout), prepare_lora(STACK)
    several = (1, 2, 3, 4, 5, 16, 17, 24, 25, 26, 64, 100, 1000, 8192)
    for mode in (torch.no_grad, torch.inference_mode):  # engines serve in one or the other
        with mode():
            for tokens in (1, 3, 5, 25):  # 3 and 5: formulations change within a bucket
                int4_lora_linear(random_x(tokens, COLUMNS), weight, lora, ids_of(tokens), BIAS)
    lora.update(1, [(torch.ones(1, COLUMNS), torch.ones(ROWS, 1), 0.5)])
    with mock.patch.object(torch._inductor.compile_fx, "compile_fx", side_effect=AssertionError):
        for tokens in several:
            x = random_x(tokens, 2 * COLUMNS)[:, ::2]  # not contiguous
            for ids in (ids_of(tokens), torch.full((tokens,), -1), torch.full((tokens,), 2)):
                int4_lora_linear(x, weight, lora, ids, BIAS)
            with torch.inference_mode():
                int4_lora_linear(x.clone(), weight, lora, ids_of(tokens), BIAS)


def test_any_number_of_shapes_in_one_process(monkeypatch):
    """Five shapes must work under a limit of one recompile, which counts for each graph alone."""
    monkeypatch.setattr(graphs.torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(**{LIMIT: 1, f"fail_on_{LIMIT}_hit": True}):
        for index in range(5):
            weight = random_weight(rows=16 + index, columns=64, groups=2)
            x = random_x(2, 64)
            y = int4_linear(x, prepare(weight))
            check(x, weight, None, None, None, layout="interleaved", y=y)


def test_other_numbers_of_adapters_are_other_graphs(monkeypatch):
    monkeypatch.setattr(graphs, "_graphs", {})
    monkeypatch.setattr(graphs.torch, "compile", lambda layer, **_: layer)
    weight, x = prepare(WEIGHT), random_x(3, COLUMNS)
    for number in (1, 2, 3):
        lora = prepare_lora(LoRAStack(STACK.a[:number], STACK.b[:number], STACK.scaling[:number]))
        int4_lora_linear(x, weight, lora, ids_of(3))
    int4_lora_linear(x, weight, lora, ids_of(3))
    assert len(graphs._graphs) == 3


def test_a_row_alone_and_in_a_batch():
    weight = prepare(WEIGHT)
    x, ids = random_x(20, COLUMNS), ids_of(20)
    batch = int4_lora_linear(x, weight, LORA, ids, BIAS)
    bound = error_bound(x, WEIGHT, STACK, ids, BIAS, weight_rounded=False, base_rounded=True)
    for row in range(0, 20, 7):
        alone = int4_lora_linear(x[row : row + 1], weight, LORA, ids[row : row + 1], BIAS)
        assert ((alone - batch[row]).abs() <= 2 * bound[row]).all()


@pytest.mark.parametrize("layout", ["int4pack", "interleaved", "int8", "checkpoint"])
def test_another_graph_takes_it_in(layout):
    packed = random_weight(**SHAPE, bits=8) if layout == "int8" else WEIGHT
    weight = prepare(packed, layout=layout)

    @torch.compile(fullgraph=True, dynamic=True)
    def block(x, ids):
        return int4_lora_linear(torch.relu(x), weight, LORA, ids, BIAS) * 2

    for tokens in (5, 6):
        x = random_x(tokens, COLUMNS)
        y = block(x, ids_of(tokens)) / 2
        check(x.relu(), packed, STACK, ids_of(tokens), BIAS, layout=layout, y=y)


@pytest.mark.parametrize(
    ("scales", "dtype", "symmetric"),
    [
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, False),
    ],
)
def test_another_graph_takes_no_tokens_and_any_strides(scales, dtype, symmetric):
    weight = random_weight(**SHAPE, dtype=scales, symmetric=symmetric)
    prepared = prepare(weight)
    block = torch.compile(lambda x: int4_linear(x.T, prepared), fullgraph=True, backend="eager")
    assert block(torch.empty(COLUMNS, 0, dtype=dtype)).shape == (0, ROWS)
    x = random_x(5, COLUMNS, dtype).T.contiguous().T
    check(x, weight, None, None, None, layout=layouts(weight)[0], y=block(x.T))


def test_autocast_changes_nothing():
    weight = prepare(WEIGHT, layout="interleaved")
    x = random_x(17, COLUMNS)
    plain = int4_lora_linear(x, weight, LORA, ids_of(17), BIAS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(int4_lora_linear(x, weight, LORA, ids_of(17), BIAS), plain)


def test_threads_share_graphs():
    weight = random_weight(rows=32, columns=64, seed=3)
    prepared, x = prepare(weight), random_x(3, 64)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: int4_linear(x, prepared), range(8)))
    for y in found:
        check(x, weight, None, None, None, layout="interleaved", y=y)


X, IDS = random_x(4, COLUMNS), ids_of(4)
GOOD = prepare(WEIGHT)
OTHER = prepare_lora(LoRAStack(STACK.a[:, :, :64], STACK.b, STACK.scaling))
WIDE = prepare_lora([LoRASlice(STACK, 1)])
TWICE = prepare_lora([LoRASlice(narrow(STACK, 30), 0), LoRASlice(narrow(STACK, 30), 16)])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, r"got PackedWeight: call prepare\(\)", (X, WEIGHT)),
        (TypeError, "weight must be a PreparedWeight, got Tensor", (X, X)),
        (TypeError, r"got LoRAStack: call prepare_lora\(\)", (X, GOOD, STACK, IDS)),
        (TypeError, r"got list: call prepare_lora\(\)", (X, GOOD, [LoRASlice(STACK, 0)], IDS)),
        (TypeError, "lora must be a PreparedLoRA, got int", (X, GOOD, 3, IDS)),
        (TypeError, "x must be float16, .* got int64", (X.long(), GOOD)),
        (ValueError, r"x must be \[tokens, in_features\] = \[\*, 128\]", (X[:, :5], GOOD)),
        (ValueError, "x must be", (X[0], GOOD)),
        (ValueError, "adapter_ids must be given with lora", (X, GOOD, LORA)),
        (ValueError, "adapter_ids must be", (X, GOOD, LORA, IDS[:2])),
        (TypeError, "adapter_ids must be int32 or int64", (X, GOOD, LORA, IDS.short())),
        (ValueError, "in_features of weight, 128", (X, GOOD, OTHER, IDS)),
        (ValueError, r"outputs of \[0, 80\), got \[1, 81\)", (X, GOOD, WIDE, IDS)),
        (ValueError, "slices must not overlap", (X, GOOD, TWICE, IDS)),
        (ValueError, "bias must be", (X, GOOD, None, None, BIAS[:3])),
        (TypeError, "bias must not be float64", (X, GOOD, None, None, BIAS.double())),
        (ValueError, "all operands must be on one device", (X.to("meta"), GOOD)),
    ],
)  # fmt: skip
def test_refuses(error, message, call):
    with pytest.raises(error, match=message):
        int4_lora_linear(*call)


def test_layouts_are_listed():
    assert layouts(WEIGHT)[-1] == "checkpoint"
