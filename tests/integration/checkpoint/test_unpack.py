"""unpack_int4_weights: the reference's dequantisation, from a checkpoint's tensors."""

import pytest
import torch

from int4_lora.integration import open_checkpoint, unpack_int4_weights
from int4_lora.integration.checkpoint.compressed_tensors import decompress
from int4_lora.reference import dequantize
from support.upstream_versions import IGNORES_G_IDX
from support.weights import SCALE_DTYPES, random_weight

pytestmark = pytest.mark.versions

LAYOUTS = ["tensor", "channel", "group", "g_idx", "g_idx_unbalanced", "g_idx_minus_one"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES.values())
def test_equals_the_reference(layout, symmetric, scale_dtype):
    weight = random_weight(layout, symmetric=symmetric, dtype=scale_dtype)
    operands = (weight.packed, weight.scale, weight.zero_point, weight.g_idx)
    assert torch.equal(
        unpack_int4_weights(*operands, shape=weight.shape), dequantize(weight, torch.float16)
    )
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        dense = unpack_int4_weights(*operands, shape=torch.tensor(weight.shape), dtype=dtype)
        assert dense.dtype == dtype
        assert torch.equal(dense, dequantize(weight).to(dtype))


@pytest.mark.parametrize("variant", ["g128", "asym-g32", "asym-channel", "actorder-g128"])
def test_a_checkpoints_tensors_as_they_are(tiny_models, variant):
    checkpoint = open_checkpoint(tiny_models[variant])
    for name in checkpoint.modules():
        parts = {
            key.rpartition(".")[2].removeprefix("weight_"): checkpoint.tensor(key)
            for key in checkpoint.tensors
            if key.startswith(f"{name}.weight_")
        }
        dense = unpack_int4_weights(**parts, dtype=torch.bfloat16)
        assert torch.equal(dense, dequantize(checkpoint.packed_weight(name)))
        if not (IGNORES_G_IDX and variant == "actorder-g128"):
            assert torch.equal(dense, decompress(checkpoint, name))


def test_refuses_by_name():
    weight = random_weight(symmetric=False)
    with pytest.raises(ValueError, match="packed must be"):
        unpack_int4_weights(weight.packed, weight.scale, shape=(13, 99))
    with pytest.raises(ValueError, match=r"zero_point must be .* packed along dim 0"):
        unpack_int4_weights(weight.packed, weight.scale, weight.zero_point.T, shape=weight.shape)
    with pytest.raises(TypeError, match=r"scale must be a tensor .* got None"):
        unpack_int4_weights(weight.packed, None, shape=weight.shape)
    with pytest.raises(TypeError, match="dtype must be float16"):
        unpack_int4_weights(weight.packed, weight.scale, shape=weight.shape, dtype=torch.int8)
