"""NVFP4A16 and MXFP4A16 with adapters, which vLLM has no kernel for on a CPU."""

import pytest
import torch

from int4_lora.integration import open_checkpoint
from int4_lora.reference import dequantize
from support.engines import COLD, engine, layers_of, logprobs, requests_of
from support.float4_checkpoints import make_float4
from support.served_truth import truth_and_allowed

O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize("name", ["nvfp4", pytest.param("mxfp4", marks=pytest.mark.nightly)])
def test_they_are_served_right(name, tiny_adapters, prompts, tmp_path):
    model = make_float4(tmp_path / name, name, shared=True)
    truth, allowed = truth_and_allowed(model, list(tiny_adapters.values()), prompts)
    assert (truth[1] - truth[0]).abs().amax() > 5 * allowed
    requests, rows = [None, *requests_of(tiny_adapters).values()], [0, 1, 2, 3]
    with engine(model, enable_lora=True, max_loras=3, max_lora_rank=16, **COLD) as llm:
        answers = logprobs(llm, prompts, [requests[row] for row in rows])
        layers = layers_of(llm)
        served = [layer.int4_lora for layer in layers.values() if hasattr(layer, "int4_lora")]
        formats = {one.weight.packed_weight().format for one in served if one.int4}
        stored = open_checkpoint(model).float4_weight(O_PROJ)
        held = layers[O_PROJ].int4_lora.weight
        assert held.holds(stored)
        dense = torch.cat([held.rows(*block, torch.bfloat16) for block in held.blocks()])
    assert formats == {name}
    assert torch.equal(dense, dequantize(stored))
    right = torch.stack([truth[row, number] for number, row in enumerate(rows)])
    assert (torch.tensor(answers, dtype=torch.float64) - right).abs().amax() <= allowed


def test_modules_that_are_merged_must_share_their_global_scale(tmp_path):
    model = make_float4(tmp_path / "own", "nvfp4")
    message = r"merges into model\.layers\.0\.self_attn\.qkv_proj have the global scales"
    with pytest.raises(ValueError, match=message), engine(model, **COLD):
        pass


def test_vllm_has_no_kernel_for_them(tmp_path):
    """Without the flag, vLLM's own sentence stands; with the option stock-base, ours."""
    model = make_float4(tmp_path / "shared", "nvfp4", shared=True)
    stock_base = {"int4_lora": {"backend": "stock-base", "warm_up": False}}
    for settings, sentence in (
        ({}, "NVFP4"),
        ({**COLD, "additional_config": stock_base}, "leave out the option backend"),
    ):
        with pytest.raises(Exception) as caught, engine(model, **settings):  # noqa: PT011
            pass
        assert sentence in str(caught.value)
