"""Asymmetric checkpoints load where compressed-tensors leaves zero-points unpacked on meta."""

import copy

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from int4_lora.integration import open_checkpoint
from int4_lora.integration.huggingface import Int4Linear, load_packed
from int4_lora.integration.huggingface.zero_points import packed_zero_points

pytestmark = pytest.mark.versions
ASYMMETRIC = {
    "group": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    "channel": {"num_bits": 4, "strategy": "channel", "symmetric": False},
    "8 bits": {"num_bits": 8, "strategy": "channel", "symmetric": False},
}


def compressed(settings, device, rows=36):
    """Return the tensors into which compressed-tensors compresses a layer."""
    groups = 64 // settings.get("group_size", 64)
    state = {
        "weight": torch.ones(rows, 64, device=device),
        "weight_scale": torch.ones(rows, groups, device=device),
        "weight_zero_point": torch.zeros(rows, groups, dtype=torch.int8, device=device),
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    return PackedQuantizationCompressor.compress(state, scheme)


def unpacked_on_meta(cls, state_dict, scheme):
    """compressed-tensors 0.18 to 0.20 on the meta device, as far as the zero-point matters."""
    state = copy.copy(state_dict)
    weight = state.pop("weight")
    words = -(-weight.shape[1] * scheme.weights.num_bits // 32)
    state["weight_packed"] = torch.empty(len(weight), words, dtype=torch.int32, device="meta")
    return state


@pytest.mark.parametrize("settings", ASYMMETRIC.values(), ids=ASYMMETRIC)
def test_the_zero_point_on_meta_has_the_shape_that_is_stored(settings, monkeypatch):
    stored = compressed(settings, "cpu")["weight_zero_point"]
    monkeypatch.setattr(PackedQuantizationCompressor, "compress", classmethod(unpacked_on_meta))
    assert compressed(settings, "meta")["weight_zero_point"].shape != stored.shape  # the fault
    with packed_zero_points():
        found = compressed(settings, "meta")["weight_zero_point"]
    assert (found.shape, found.dtype, found.device.type) == (stored.shape, stored.dtype, "meta")
    assert compressed(settings, "meta")["weight_zero_point"].shape != stored.shape  # as before


def test_what_is_not_packed_stays(monkeypatch):
    settings = {"num_bits": 4, "strategy": "tensor", "symmetric": False}
    monkeypatch.setattr(PackedQuantizationCompressor, "compress", classmethod(unpacked_on_meta))
    with packed_zero_points():
        assert compressed(settings, "meta")["weight_zero_point"].shape == (36, 1)


@pytest.mark.parametrize("settings", ASYMMETRIC.values(), ids=ASYMMETRIC)
def test_tensors_with_values_stay(settings):
    before = compressed(settings, "cpu")
    with packed_zero_points():
        after = compressed(settings, "cpu")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_error_while_loading_restores_compressed_tensors():
    before = PackedQuantizationCompressor.__dict__["compress"]

    def fail():
        with packed_zero_points():
            assert PackedQuantizationCompressor.__dict__["compress"] is not before
            raise RuntimeError("loading")

    with pytest.raises(RuntimeError, match="loading"):
        fail()
    assert PackedQuantizationCompressor.__dict__["compress"] is before


@pytest.mark.parametrize("variant", ["asym-g32", "asym-channel"])
def test_asymmetric_checkpoints_load_bit_for_bit(square, variant):
    model, checkpoint = load_packed(square(variant)), open_checkpoint(square(variant))
    layers = {name: one for name, one in model.named_modules() if isinstance(one, Int4Linear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        ours, stored = layer.packed_weight(), checkpoint.packed_weight(name)
        assert torch.equal(ours.zero_point, stored.zero_point)
        assert torch.equal(ours.packed, stored.packed)
