"""The peers: weights as they store them, and what is known of those that are installed."""

import importlib

import pytest
import torch

from int4_lora.integration.conformance import load_backend
from int4_lora.integration.conformance.peers.unsigned import (
    int8_zero_points,
    nibbles,
    unsigned_codes,
    unsigned_zero_points,
)
from int4_lora.integration.conformance.peers.vllm_lora_ops import FILE, FOLDER, VllmLoraOps
from int4_lora.reference import PackedWeight
from int4_lora.reference.conformance import Backend, run, select, settled
from support.upstream_versions import CANNOT_DECOMPRESS_MXFP4

OPERATORS = """
import torch

def bgmv_shrink(x, a, h, ids, scaling):
    h[:] = scaling * torch.einsum("bi,boi->bo", x.to(h.dtype), a[ids.clamp(min=0)].to(h.dtype))
    h[ids == -1] = 0

def bgmv_expand_slice(h, b, y, ids, start, size, add_inputs):
    delta = torch.einsum("bi,boi->bo", h.to(y.dtype), b[ids.clamp(min=0)].to(y.dtype))
    y[:, start:start + size] += delta.masked_fill((ids == -1)[:, None], 0)
"""


def failures(backend, cases):
    outcomes = settled(list(run(backend, select(cases))))
    assert any(outcome.status == "passed" for outcome in outcomes)
    return {each.case: each.diagnosis for each in outcomes if each.status == "failed"}


def test_a_weight_as_peers_store_it():
    packed = torch.tensor([[0x76543210], [-1]], dtype=torch.int32)  # codes -8 .. -1, and 7 each
    scale = torch.ones(2, 2)
    zero_point = torch.tensor([[0xA8, 0x0F]], dtype=torch.int32)  # one word for each group
    weight = PackedWeight(packed, scale, (2, 8), zero_point)
    assert unsigned_codes(weight).tolist() == [[*range(8)], [15] * 8]
    assert int8_zero_points(weight).tolist() == [[0, 7], [2, -8]]
    assert unsigned_zero_points(weight).tolist() == [[8, 15], [10, 0]]
    assert nibbles(torch.tensor([[1, 2, 3]], dtype=torch.int32)).tolist() == [[0x21, 0x03]]


def test_operators_of_a_vllm_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER, raising=False)
    with pytest.raises(ImportError, match=FOLDER):
        VllmLoraOps()
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(ImportError, match="there is no"):
        VllmLoraOps()
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / FILE).write_text(OPERATORS)
    backend = Backend(VllmLoraOps(), "operators")
    assert failures(backend, "shrink/*/bf16,int4_lora_linear/slices_*/bf16") == {}


@pytest.mark.versions
def test_compressed_tensors_reads_fp4_but_for_a_scale_that_is_not_a_number():
    pytest.importorskip("compressed_tensors")
    backend = load_backend("compressed_tensors")
    found = failures(backend, "*nvfp4*,*mxfp4*")
    assert "dequantize/mxfp4_all_scales/bf16" in found
    wrong = {case for case in found if case.startswith("int4_linear")}
    assert all("mxfp4" in case for case in wrong) if CANNOT_DECOMPRESS_MXFP4 else not wrong


@pytest.mark.versions
def test_the_fake_quantised_forward_is_the_packed_layer():
    pytest.importorskip("compressed_tensors")
    backend = load_backend("fake_quantized")
    assert failures(backend, "int4_linear/group_*/bf16,int4_linear/bias_*/bf16") == {}


@pytest.mark.parametrize(
    ("module", "name", "mistakes"),
    [
        ("torchao", "torchao", {"round_before_subtract"}),
        # sums in 16 bits on some CPUs; with a single input that counts, an offset rounds alike
        ("mlx", "mlx", {"round_before_subtract", "offset", "low_precision_accumulate"}),
        ("hqq", "hqq", set()),
        ("auto_round", "auto_round", set()),
        ("onnxruntime", "onnxruntime", set()),
        ("openvino", "openvino", set()),
    ],
)
@pytest.mark.filterwarnings("default")
def test_zero_points_of_a_peer(module, name, mistakes):
    pytest.importorskip(module)
    found = failures(load_backend(name), "int4_linear/one_hot/*,int4_linear/group_32*/*")
    named = {mistake for diagnosis in found.values() for mistake in diagnosis}
    assert named <= mistakes
    assert ("round_before_subtract" in named) == bool(mistakes)


@pytest.mark.versions
def test_transformers_eager_experts_conform():
    peer = "int4_lora.integration.conformance.peers.transformers_experts"
    try:
        under_test = importlib.import_module(peer).TransformersExperts()
    except ImportError as error:
        pytest.skip(str(error))
    backend = Backend(under_test, "transformers")
    outcomes = settled(list(run(backend, select("int4_moe/*"))))
    assert {o.case: o.message for o in outcomes if o.status == "failed"} == {}
    skipped = {o.case for o in outcomes if o.status == "skipped"}
    assert skipped == {"int4_moe/mixed/fp64"}
