"""NVFP4A16 and MXFP4A16 of llm-compressor's ``oneshot``: read, unpacked, merged and served."""

import pytest
import torch

from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint.inspect import inspect
from int4_lora.integration.checkpoint.verify import verify
from int4_lora.integration.conversion import merge_checkpoint, unpack_checkpoint
from int4_lora.integration.huggingface import load_packed
from int4_lora.reference import dequantize
from support.conversion import tensors_of
from support.served_beside import PYTHON, assert_served_right

FORMATS = {"NVFP4A16": "nvfp4", "MXFP4A16": "mxfp4"}


@pytest.fixture(scope="module", params=FORMATS)
def quantised_float4(request, dense, tmp_path_factory):
    """Return the format and the folder of a checkpoint as ``oneshot`` leaves it."""
    import transformers
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    folder = tmp_path_factory.mktemp(request.param) / "written"
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    modifier = QuantizationModifier(scheme=request.param, targets="Linear", ignore=["lm_head"])
    model = oneshot(model=model, recipe=modifier)
    model.save_pretrained(folder, save_compressed=True)
    return FORMATS[request.param], folder


def test_it_is_read_kept_packed_unpacked_and_merged(quantised_float4, tiny_adapters, tmp_path):
    name, folder = quantised_float4
    checkpoint = open_checkpoint(folder)
    assert [checkpoint.float4_weight(one).format for one in checkpoint.modules()] == [name] * 14
    assert {finding.verdict for finding in verify(checkpoint)} <= {"same", "upstream_wrong"}
    assert all(one.bits == 4 and one.nan_scales == 0 for one in inspect(checkpoint).modules)
    unpack_checkpoint(folder, tmp_path / "dense")
    dense = tensors_of(tmp_path / "dense")
    kept = load_packed(folder)
    for module in checkpoint.modules():
        expected = dequantize(checkpoint.float4_weight(module))
        assert torch.equal(dense[f"{module}.weight"], expected)
        assert torch.equal(kept.get_submodule(module).weight + 0, expected)
    adapters = [(tiny_adapters["a"], 1.0)]
    outcome = merge_checkpoint(folder, tmp_path / "merged", adapters, to=name)
    assert 0 < outcome.report["total"]["relative_error"] < 0.2
    assert open_checkpoint(tmp_path / "merged").schemes == checkpoint.schemes


@pytest.mark.skipif(PYTHON is None, reason="INT4_LORA_VLLM_PYTHON names no Python with vLLM")
def test_vllm_serves_it_with_adapters(quantised_float4, tiny_adapters, tmp_path):
    _, folder = quantised_float4
    assert_served_right(folder, folder, tiny_adapters, tmp_path)
