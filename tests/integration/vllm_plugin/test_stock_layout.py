"""Our code on the layout of vLLM's kernel for CPUs, which is laid out here by hand."""

from types import SimpleNamespace

import pytest
import torch

from int4_lora.integration.vllm_plugin.base_choice import MANY_TOKENS
from int4_lora.integration.vllm_plugin.load_check import fault_of_layer
from int4_lora.integration.vllm_plugin.stock_layout import shared_weight
from int4_lora.reference import dequantize, quantize, unpack

ROWS, COLUMNS = 96, 256


def packed_weight(group_size=64, symmetric=True, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(ROWS, COLUMNS, generator=generator)
    dense *= 1 + torch.arange(ROWS)[:, None] + torch.arange(COLUMNS) / 50  # groups differ
    return quantize(dense, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)


def words_of(numbers):
    """Return each eight unsigned numbers of the last dimension in a word, low nibble first."""
    shifted = numbers.to(torch.int64).unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)
    return shifted.sum(-1).to(torch.int32)


def laid_out(packed):
    """Return a layer as vLLM's kernel leaves it: blocks of 16 outputs, column by column."""
    codes = unpack(packed.packed, COLUMNS).to(torch.int32) + 8
    words = words_of(codes.T)  # [columns, rows / 8]
    blocks = words.view(COLUMNS, -1, 2).permute(1, 0, 2).reshape(ROWS // 16, 2 * COLUMNS)
    parameter = lambda tensor: torch.nn.Parameter(tensor.contiguous(), requires_grad=False)  # noqa: E731
    layer = SimpleNamespace(weight_packed=parameter(blocks), weight_scale=parameter(packed.scale.T))
    if packed.zero_point is not None:
        layer.weight_zero_point = parameter(packed.zero_point.T)
    return layer


KINDS = {
    "symmetric": packed_weight(),
    "asymmetric": packed_weight(symmetric=False),
    "channel": packed_weight(group_size=COLUMNS),
    "float16": packed_weight(dtype=torch.float16),
}


@pytest.mark.parametrize("packed", KINDS.values(), ids=KINDS)
def test_a_weight_is_read_from_vllms_tensors(packed):
    layer = laid_out(packed)
    shared = shared_weight(layer, packed)
    assert shared.words.data_ptr() == layer.weight_packed.data_ptr()
    assert shared.nbytes == packed.nbytes
    for start, stop in ((0, ROWS), (16, 64), (80, 96)):
        rows = shared.rows(start, stop, torch.float64)
        assert torch.equal(rows, dequantize(packed)[start:stop].double())


@pytest.mark.parametrize(
    "packed",
    [KINDS["asymmetric"], pytest.param(KINDS["float16"], marks=pytest.mark.nightly)],
    ids=["asymmetric", "float16"],
)
def test_many_tokens_are_right(packed):
    shared = shared_weight(laid_out(packed), packed)
    assert fault_of_layer(packed, shared, packed.scale.dtype, MANY_TOKENS) is None


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_tensors_that_do_not_give_the_bits_back_are_not_read(name):
    """Whatever another version of vLLM lays out, the checkpoint's bits decide."""
    packed = KINDS["asymmetric"]
    for spoil in (
        lambda tensor: tensor.flip(0),
        lambda tensor: tensor.T,
        lambda tensor: tensor.T.contiguous(),
        lambda tensor: tensor.double(),
        lambda tensor: torch.empty(0),  # as zentorch leaves it
    ):
        layer = laid_out(packed)
        assert shared_weight(layer, packed) is not None
        parameter = getattr(layer, name)
        parameter.data = spoil(parameter.data)
        assert shared_weight(layer, packed) is None


def test_zero_points_that_the_checkpoint_lacks_are_not_read():
    """VLLM's W4A8 adds them."""
    packed = KINDS["symmetric"]
    layer = laid_out(packed)
    layer.weight_zero_point = torch.nn.Parameter(
        torch.zeros(packed.scale.shape[1], ROWS // 8, dtype=torch.int32), requires_grad=False
    )
    assert shared_weight(layer, packed) is None
