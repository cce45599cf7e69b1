"""Models whose linears are NVFP4 or MXFP4 stay packed, and save what they were loaded from."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from int4_lora.integration import open_checkpoint
from int4_lora.integration.conversion import unpack_checkpoint
from int4_lora.integration.huggingface import Int4Linear, keep_packed, load_packed
from int4_lora.reference import dequantize
from support.checkpoints import Q_PROJ
from support.float4_checkpoints import make_float4

pytestmark = pytest.mark.versions
FORMATS = ("nvfp4", "mxfp4")
TOKENS = torch.arange(1, 25).view(2, 12) * 7 % 512


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folder of a tiny FP4 Llama of each format, by name."""
    root = tmp_path_factory.mktemp("float4")
    return {name: make_float4(root / name, name) for name in FORMATS}


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_dense_model_and_adapters_train(models, tmp_path, name):
    """W is the bfloat16 weight that unpack writes; the model multiplies it in float32."""
    model = keep_packed(load(models[name]))
    kept = [layer for layer in model.modules() if isinstance(layer, Int4Linear)]
    assert len(kept) == 14
    assert {layer.prepared.kind.__name__ for layer in kept} == {"Float4Weight"}
    assert kept[0].weight.dtype == torch.float32
    unpack_checkpoint(models[name], tmp_path / "dense")
    dense = load(tmp_path / "dense")
    with torch.no_grad():
        logits, expected = (one(TOKENS).logits for one in (model, dense))
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    grads = []
    for one in (model, dense):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        tuned = get_peft_model(one, config)
        tuned(TOKENS, labels=TOKENS).loss.backward()
        grads.append({k: p.grad for k, p in tuned.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 8
    for key, grad in grads[1].items():
        assert (grads[0][key] - grad).norm() <= 1e-4 * grad.norm(), key


@pytest.mark.parametrize("name", FORMATS)
def test_save_pretrained_writes_the_checkpoint_again(models, tmp_path, name):
    model = load_packed(models[name])
    assert model.get_submodule(Q_PROJ).weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    before = load_file(models[name] / "model.safetensors")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8)), key
    old, new = open_checkpoint(models[name]), open_checkpoint(tmp_path / "saved")
    assert old.schemes == new.schemes
    weight = load_packed(tmp_path / "saved").get_submodule(Q_PROJ).weight
    assert torch.equal(weight + 0, dequantize(old.float4_weight(Q_PROJ)))


def test_one_copy_is_held_and_never_cast(models):
    model = load_packed(models["nvfp4"]).to(torch.float64).to(torch.float16)
    layer = model.get_submodule(Q_PROJ)
    stored = open_checkpoint(models["nvfp4"]).float4_weight(Q_PROJ)
    assert layer.prepared.holds(stored)
    held = sum(buffer.nbytes for buffer in layer.buffers())
    assert stored.nbytes < held <= stored.nbytes + 3 * 1024 + 4  # two tables
    assert layer.weight.dtype == torch.float16
    assert not [name for name, _ in layer.named_parameters() if name != "bias"]
