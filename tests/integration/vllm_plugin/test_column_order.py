"""The activation order of a layer: loaded once a module, the same for all, loaded again."""

import pytest
import torch
from torch import nn

from int4_lora.integration.vllm_plugin.column_order import ColumnOrder

ORDER = torch.tensor([1, 0, 1, 0], dtype=torch.int32)


def parameter(device="cpu"):
    return nn.Parameter(torch.zeros(4, dtype=torch.int32, device=device), requires_grad=False)


def test_merged_modules_share_an_order():
    order = ColumnOrder("qkv", "g_idx", modules=3)
    for shard in "qkv":
        order.load(parameter(), ORDER.long(), shard)
    assert torch.equal(order.take(), ORDER)
    assert order.take() is None
    order.load(parameter(), ORDER, "q")
    with pytest.raises(ValueError, match="merges into qkv have different g_idx, and the merged"):
        order.load(parameter(), ORDER.flip(0), loaded_shard_id="k")


def test_no_merged_module_lacks_it():
    order = ColumnOrder("qkv", "g_idx", modules=3)
    order.load(parameter(), ORDER, "q")
    with pytest.raises(ValueError, match="1 of the 3 modules that vLLM merges into qkv"):
        order.take()
    order.load(parameter(), ORDER)  # a checkpoint that stores the merged layer
    assert torch.equal(order.take(), ORDER)


def test_an_order_that_is_not_the_usual_one_is_refused():
    usual = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    order = ColumnOrder("o_proj", "g_idx", usual=usual)
    order.load(parameter(), usual)
    with pytest.raises(ValueError, match="o_proj: g_idx must number the groups in column order"):
        order.load(parameter(), ORDER)


def test_nothing_is_counted_on_the_device_meta():
    """There vLLM counts what is copied, to know when a layer is complete."""
    order = ColumnOrder("qkv", "g_idx", modules=3)
    order.load(parameter("meta"), ORDER, "q")
    assert order.take() is None
