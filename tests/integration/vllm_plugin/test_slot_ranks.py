"""Slots read at the ranks of a batch's adapters."""

import logging

import pytest
import torch

from int4_lora.compiled import prepare
from int4_lora.compiled.graphs import cache
from int4_lora.integration.vllm_plugin import served_engine
from int4_lora.integration.vllm_plugin.options import Options
from int4_lora.integration.vllm_plugin.served_engine import ServedEngine
from int4_lora.integration.vllm_plugin.served_layer import ServedLayer, adapter_slots
from int4_lora.integration.vllm_plugin.slot_ranks import narrower_ranks
from int4_lora.reference import quantize

INPUTS, WIDTHS, MOST_RANK = 128, (64, 32), 32
RANKS = (3, 24, 32, 0)  # of the adapter in each slot; the last slot's has none for the layer
WEIGHT = quantize(
    torch.randn(sum(WIDTHS), INPUTS, generator=torch.Generator().manual_seed(0)).bfloat16(),
    group_size=32,
)


def empty_layer(max_tokens=8, **options):
    """Return a layer with empty slots, and its slots as vLLM writes to them."""
    engine = ServedEngine(Options(**options), max_tokens=max_tokens)
    layer = ServedLayer("layers.0.qkv_proj", engine, weight=prepare(WEIGHT))
    a = [torch.zeros(len(RANKS), 1, MOST_RANK, INPUTS).bfloat16() for _ in WIDTHS]
    b = [torch.zeros(len(RANKS), 1, width, MOST_RANK).bfloat16() for width in WIDTHS]
    layer.lora, views = adapter_slots(a, b)
    return layer, a, views


@pytest.fixture(scope="module")
def filled():
    """Return a layer with an adapter of another rank in each slot, and the exact weight of each."""
    generator = torch.Generator().manual_seed(1)
    layer, a, views = empty_layer()
    layer.read_at_ranks(None)
    exact = torch.zeros(len(RANKS), sum(WIDTHS), INPUTS, dtype=torch.float64)
    for slot, rank in enumerate(RANKS):
        start = 0
        for slice_a, slice_b in zip(a, views, strict=True):
            width = slice_b.shape[2]
            slice_a[slot, 0, :rank] = torch.randn(rank, INPUTS, generator=generator) / 16
            slice_b[slot, 0, :, :rank] = torch.randn(width, rank, generator=generator)
            part_a, part_b = slice_a[slot, 0].double(), slice_b[slot, 0].double()
            exact[slot, start : start + width] = part_b @ part_a
            start += width
        layer.slot_ranks.note(slot, rank)
    return layer, exact


def ranks_read(layer, ids):
    lora = layer.slot_ranks.of_batch(torch.tensor(ids))
    return None if lora is None else {part.rank for part in lora.slices}


def test_ranks_double_up_to_that_of_the_slots():
    assert narrower_ranks(1) == narrower_ranks(16) == []
    assert narrower_ranks(32) == [16]
    assert narrower_ranks(320) == [16, 32, 64, 128, 256]


def test_a_batch_reads_the_ranks_of_its_adapters(filled):
    layer, _ = filled
    assert ranks_read(layer, [-1, 0, -1]) == {16}
    assert ranks_read(layer, [1, 0, 3]) == {32}
    assert ranks_read(layer, [0, 2]) == {32}
    assert ranks_read(layer, [3, -1, 99]) is None  # 99 is no slot
    assert ranks_read(layer, []) is None


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("slots", [(0,), (0, -1), (1, 0), (2, 3, 1, -1), (3, -1), (3,)])
@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_every_rank_gives_the_right_sums(filled, fused, slots, tokens):
    layer, exact = filled
    ids = torch.tensor([slots[token % len(slots)] for token in range(tokens)])
    right_for(layer, exact, ids, fused)


@torch.inference_mode()
def right_for(layer, exact, ids, fused):
    tokens = len(ids)
    x = torch.randn(tokens, INPUTS, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    base = layer.forward(x, None, None)
    y = layer.forward(x, ids, None) if fused else layer.add_adapters(base, x, ids)
    delta = torch.einsum("toi,ti->to", exact[ids], x.double()) * (ids >= 0).unsqueeze(1)
    torch.testing.assert_close(y.double(), base.double() + delta, rtol=0.02, atol=0.1)


def test_what_lies_beyond_the_rank_is_not_read(filled):
    layer, _ = filled
    ids = torch.tensor([0, 0, -1, 0, 3])
    with torch.inference_mode():
        spoilt_beyond(layer, torch.randn(5, INPUTS).bfloat16(), ids, torch.ones(5, dtype=int))


def spoilt_beyond(layer, x, ids, needs_more):
    before = layer.forward(x, ids, None)
    for part in layer.lora.slices:
        part.a[:, 16:], part.bt[:, 16:] = part.a[:, 16:] + torch.nan, part.bt[:, 16:] + torch.nan
    try:
        assert torch.equal(layer.forward(x, ids, None), before)
        assert layer.forward(x, needs_more, None).isnan().all()
    finally:
        for part in layer.lora.slices:
            part.a.nan_to_num_(), part.bt.nan_to_num_()


def test_requests_compile_no_graph(filled):
    """The check at load compiles the graphs for the strides that are served."""
    layer, _ = filled
    layer.adapters_fault(layer.lora, None)
    layer.base_fault(WEIGHT, layer.weight, None)
    before = set(cache._graphs)
    for tokens in (1, 2, 8):
        for slot in range(-1, len(RANKS)):
            ids = torch.full((tokens,), slot)  # as vLLM makes them: outside of inference mode
            with torch.inference_mode():
                layer.forward(torch.randn(tokens, INPUTS).bfloat16(), ids, None)
    assert set(cache._graphs) == before


def test_ranks_that_fail_the_check_are_left_out(monkeypatch):
    layer, _, _ = empty_layer()
    monkeypatch.setattr(
        ServedLayer,
        "adapters_fault",
        lambda self, lora, bias: "wrong" if lora.slices[0].rank == 16 else None,
    )
    layer.read_at_ranks(None)
    layer.slot_ranks.note(0, 3)
    assert ranks_read(layer, [0]) == {MOST_RANK}


def test_without_warm_up_whole_slots_are_read():
    """What is compiled by the first requests is kept small, and nothing runs unchecked."""
    layer, _, _ = empty_layer(warm_up=False)
    layer.read_at_ranks(None)
    layer.slot_ranks.note(0, 3)
    assert ranks_read(layer, [0]) == {MOST_RANK}
    assert ranks_read(layer, [1]) is None
    assert layer.engine.checked == {}


def test_layers_of_a_shape_share_their_graphs_and_their_check():
    layer, _, _ = empty_layer()
    other, _, _ = empty_layer()
    other.engine = layer.engine
    for each in (layer, other):
        assert each.adapters_fault(each.lora, None) is None
        graphs = set(cache._graphs)
    assert len(layer.engine.checked) == 1
    ids = torch.zeros(5, dtype=torch.int64)
    with torch.inference_mode():
        for each in (layer, other):
            each.forward(torch.randn(5, INPUTS).bfloat16(), ids, None)
    assert set(cache._graphs) == graphs


def test_progress_is_logged_while_graphs_are_compiled(monkeypatch, caplog):
    seconds = iter(range(0, 100, 2))  # 2 s in each check
    monkeypatch.setattr(served_engine.time, "monotonic", lambda: next(seconds))
    engine = ServedEngine(max_tokens=8)
    with caplog.at_level(logging.INFO, logger="vllm.int4_lora"):
        for kind in ("a", "b"):
            engine.fault_of_kind(kind, f"layer {kind}", lambda tokens: tokens, lambda tokens: None)
        engine.log_summary()
    assert [line for line in caplog.messages if "graphs" in line] == [
        "int4_lora: 3 graphs compiled and checked in 6 s; next is layer a, 4 tokens",
        "int4_lora: 6 graphs compiled and checked in 12 s; next is layer a, 7 tokens",
        "int4_lora: 9 graphs compiled and checked in 18 s; next is layer b, 2 tokens",
        "int4_lora: 12 graphs compiled and checked in 24 s; next is layer b, 5 tokens",
        "int4_lora: 15 graphs compiled and checked in 30 s; next is layer b, 8 tokens",
        "int4_lora: 16 graphs compiled or loaded, and checked against the reference, in 32 s",
    ]
