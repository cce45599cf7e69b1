"""What vLLM's loader of experts does not notice: tensors that are missing, or of another shape."""

import re

import pytest
import torch
from torch import nn

from int4_lora.integration.vllm_plugin.experts_loading import ExpertsLoader

NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
LAYER = "model.layers.3.mlp.experts"
SHAPES = {"w1": (16, 4), "w3": (16, 4), "w2": (32, 2)}  # words of [16, 32] and of down [32, 16]


@pytest.fixture
def loads():
    """Return what vLLM's loader was called with."""
    return []


@pytest.fixture
def loader(loads):
    def load(param, loaded, name, *, shard_id, expert_id, return_success):
        loads.append((name, shard_id, expert_id))
        return return_success

    return ExpertsLoader(load, LAYER, NAMES, ranks=2, scale_dtypes=set())


def parameter(shard, tensor="weight_packed", whole=False):
    """Return a rank's parameter for two experts: half of gate and up, or half of down's columns."""
    shape = (32, 1) if shard == "w2" else (16, 4)
    param = nn.Parameter(torch.zeros(2, *shape, dtype=torch.int32), requires_grad=False)
    param.whole_on_each_rank = whole
    return param


def name_of(shard, tensor="weight_packed"):
    return f"{LAYER}.{'w2' if shard == 'w2' else 'w13'}_{tensor}"


def load(loader, shard, expert, shape=None, tensor="weight_packed"):
    words = torch.zeros(shape or SHAPES[shard], dtype=torch.int32)
    return loader(parameter(shard), words, name_of(shard, tensor), shard_id=shard, expert_id=expert)


def test_whole_experts_are_loaded_as_vllm_does(loader, loads):
    for expert in (0, 1):
        for shard in NAMES:
            load(loader, shard, expert)
    assert loads[:2] == [(name_of("w1"), "w1", 0), (name_of("w2"), "w2", 0)]
    loader.check_complete(("weight_packed",), 2)


def test_a_missing_tensor_is_named(loader):
    for expert in (0, 1):
        for shard in ("w1", "w2"):
            load(loader, shard, expert)
    load(loader, "w3", 0)
    sentence = f"lacks 1 tensors of the experts of {LAYER}; the first is {LAYER}.1.up_proj.weight_p"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        loader.check_complete(("weight_packed",), 2)


def test_what_was_loaded_before_does_not_count_when_weights_are_loaded_again(loader):
    for shard in NAMES:
        load(loader, shard, 0)
    loader.check_complete(("weight_packed",), 1)
    with pytest.raises(ValueError, match="lacks 3 tensors"):
        loader.check_complete(("weight_packed",), 1)


@pytest.mark.parametrize(
    ("shard", "shape"), [("w1", (16, 3)), ("w3", (8, 4)), ("w2", (32, 1)), ("w2", (31, 2))]
)
def test_another_shape_is_refused(loader, loads, shard, shape):
    sentence = rf"1\.{NAMES[shard]}\.weight_packed must be \[.*\] .* got {re.escape(str([*shape]))}"
    with pytest.raises(ValueError, match=sentence):
        load(loader, shard, 1, shape)
    assert not loads


def test_scales_per_row_of_down_are_whole_on_each_rank(loader):
    scale = torch.zeros(32, 1, dtype=torch.int32)
    name = name_of("w2", "weight_scale")
    loader(parameter("w2", whole=True), scale, name, shard_id="w2", expert_id=0)
    with pytest.raises(ValueError, match=r"must be \[32, 2\]"):
        loader(parameter("w2"), scale, name, shard_id="w2", expert_id=0)


def test_weight_shapes_are_not_compared(loader, loads):
    shape = torch.tensor([32, 16])
    name = name_of("w2", "weight_shape")
    assert loader(parameter("w2"), shape, name, shard_id="w2", expert_id=0, return_success=True)
    assert loads == [(name, "w2", 0)]


def test_the_dtype_of_scales_is_kept(loads):
    dtypes = set()
    loader = ExpertsLoader(lambda *_, **__: None, LAYER, NAMES, 1, dtypes)
    param = nn.Parameter(torch.zeros(2, 8, 1, dtype=torch.bfloat16), requires_grad=False)
    scale = torch.ones(4, 1, dtype=torch.float16)
    loader(param, scale, name_of("w1", "weight_scale"), shard_id="w1", expert_id=0)
    assert param.dtype == torch.float16
    assert dtypes == {torch.float16}
