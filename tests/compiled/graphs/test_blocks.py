"""A base computed block by block is right on each kind of CPU; blocks of a shape share a graph."""

import pytest
import torch

from int4_lora.compiled import int4_linear, int4_lora_linear, prepare, prepare_lora, products
from int4_lora.compiled.formulations import TILES, tiles
from int4_lora.compiled.gradients.plan import plan_gradient
from int4_lora.compiled.graphs import blocks as by_blocks
from int4_lora.compiled.graphs import cache as graphs
from int4_lora.compiled.graphs.entry import plan
from int4_lora.reference import error_bound
from int4_lora.reference import int4_lora_linear as reference
from int4_lora.reference.lora import accumulation_dtype
from support.gradients import bounds, of_reference
from support.weights import random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

ROWS, COLUMNS = 304, 128  # four blocks of 64 rows, and a rest
WORKSPACE = 128 * COLUMNS * 4  # two blocks in float32
MANY = products.BATCHED_TOKENS + 2
NARROW, WIDE = (), (torch.bfloat16,)  # the slow dtypes of two kinds of CPU


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tiles, "WORKSPACE_BYTES", {"cpu": WORKSPACE, "cuda": 0})
    monkeypatch.setattr(graphs, "_graphs", {})


def operands(dtype, tokens, **properties):
    weight = random_weight(rows=ROWS, columns=COLUMNS, dtype=dtype, **properties)
    stack = random_stack(rows=ROWS, columns=COLUMNS, dtype=dtype)
    ids = torch.arange(tokens) % (stack.a.shape[0] + 1) - 1
    return weight, stack, random_x(tokens, COLUMNS, dtype), ids


@pytest.mark.parametrize(
    ("slow", "dtype", "tokens", "properties"),
    [
        (NARROW, torch.bfloat16, 26, {}),
        (NARROW, torch.bfloat16, MANY, {}),
        (WIDE, torch.bfloat16, MANY, {}),
        (WIDE, torch.bfloat16, MANY, {"layout": "g_idx", "symmetric": False}),
        (WIDE, torch.float32, 26, {}),
        (WIDE, torch.bfloat16, MANY, {"bits": 8, "layout": "g_idx", "symmetric": False}),
        (NARROW, torch.bfloat16, MANY, {"bits": 8, "layout": "channel"}),
        (NARROW, torch.float16, 26, {"bits": 8, "symmetric": False}),
    ],
)
def test_the_layer_is_within_its_bound(slow, dtype, tokens, properties, monkeypatch):
    monkeypatch.setattr(products, "SLOW_ON_CPU", slow)
    weight, stack, x, ids = operands(dtype, tokens, **properties)
    prepared, bias = prepare(weight), torch.linspace(-1, 1, ROWS).to(dtype)
    flags = {"weight_rounded": True, "base_rounded": True}
    y = int4_lora_linear(x, prepared, prepare_lora(stack), ids, bias)
    truth = reference(x.double(), weight, stack, ids, bias)
    assert ((y - truth).abs() <= error_bound(x, weight, stack, ids, bias, **flags)).all()
    alone = int4_linear(x, prepared)
    assert alone.dtype == dtype
    bound = error_bound(x, weight, **flags)
    assert ((alone - reference(x.double(), weight)).abs() <= bound).all()


@pytest.mark.parametrize(
    ("dtype", "properties"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"symmetric": False}),
        (torch.bfloat16, {"layout": "g_idx", "symmetric": False}),
        (torch.float64, {"layout": "g_idx_unbalanced"}),
    ],
)
def test_the_gradient_of_x_is_summed_block_by_block(dtype, properties, monkeypatch):
    monkeypatch.setattr(products, "SLOW_ON_CPU", WIDE)
    scales = torch.float32 if dtype == torch.float64 else dtype
    weight = random_weight(rows=ROWS, columns=COLUMNS, dtype=scales, **properties)
    g, sums = random_x(3, ROWS, dtype), accumulation_dtype(torch.empty(0, dtype=dtype))
    x = torch.zeros(3, COLUMNS, dtype=dtype)
    prepared = prepare(weight)
    mine = plan_gradient(g, prepared, sums)(g)
    assert {key[0][0] for key in graphs._graphs} == {"decoded"}
    assert mine.dtype == sums
    (exact,), (bound,) = (
        of_reference(x, weight, None, None, g, torch.float64),
        bounds(x, weight, None, None, g),
    )
    assert ((mine.double() - exact).abs() <= bound).all()


def test_blocks_of_a_shape_share_a_graph_whatever_their_number(monkeypatch):
    compiled, compile_graph = [], graphs.compile_graph

    def counted(key, *others):
        compiled.append(key)
        return compile_graph(key, *others)

    monkeypatch.setattr(by_blocks, "compile_graph", counted)
    for rows in (256, 512):  # 2 and 4 blocks
        weight = prepare(random_weight(rows=rows, columns=COLUMNS), layout="interleaved")
        for tokens in (MANY, 2 * MANY):
            int4_linear(random_x(tokens, COLUMNS), weight)
    assert len(compiled) == 1


@pytest.mark.parametrize("slow", [NARROW, WIDE])
def test_few_tokens_in_16_bits_are_part_of_the_layers_graph(slow, monkeypatch):
    monkeypatch.setattr(products, "SLOW_ON_CPU", slow)
    weight, _, x, _ = operands(torch.bfloat16, MANY)
    prepared = prepare(weight)
    assert (tiles.blocks_of(x[:26], prepared) is None) == (slow == NARROW)
    assert tiles.blocks_of(x, prepared) is not None
    assert tiles.blocks_of(x.to("meta"), prepared) is None
    assert tiles.blocks_of(x[:26].float(), prepared) is not None


def test_parts_share_the_memory_of_the_weight_and_are_forgotten_with_it():
    for layout in ("int4pack", "interleaved", "int8", "checkpoint"):
        bits = 8 if layout == "int8" else 4
        weight = prepare(random_weight(rows=ROWS, columns=COLUMNS, bits=bits), layout=layout)
        x = random_x(MANY, COLUMNS)
        plan(x, weight, formulation=TILES)(x)
        parts = [part for group in by_blocks._same_shapes(weight, 128) for part in group]
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == ROWS
        held = {tensor.untyped_storage().data_ptr() for tensor in weight.tensors}
        for part in parts:
            assert {one.untyped_storage().data_ptr() for one in part.weight.tensors} <= held
        before = len(by_blocks._parts)
        del weight, parts, part
        assert len(by_blocks._parts) == before - 1


def test_a_transform_of_torch_func_keeps_the_base_in_the_graph():
    weight, _, x, _ = operands(torch.bfloat16, MANY)
    prepared = prepare(weight)
    apart = torch.func.vmap(lambda one: int4_linear(one, prepared))(x.view(1, *x.shape))
    assert torch.allclose(apart[0].float(), int4_linear(x, prepared).float(), atol=0.02, rtol=0.02)
