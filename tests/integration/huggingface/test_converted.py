"""AWQ and GPTQ checkpoints in transformers: converted in memory, and kept packed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from int4_lora.integration import open_checkpoint
from int4_lora.integration.huggingface import Int4Linear, keep_packed, load_packed
from support import other_checkpoints

pytestmark = pytest.mark.versions
TOKENS = torch.arange(1, 25).view(2, 12) * 7 % 512
V2 = {"checkpoint_format": "gptq_v2", "sym": False}
CASES = {  # the model whose weights are written again, the method, fields of its config
    "awq": ("asym-g32", "awq", {}),
    "gptq": ("g128", "gptq", {"group_size": 128}),
    "gptq_v2": ("asym-channel", "gptq", {**V2, "group_size": -1}),
    "gptq_8_bits": ("w8-g128", "gptq", {"group_size": 128, "bits": 8}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_source(square, tmp_path, case):
    variant, method, changes = CASES[case]
    folder = other_checkpoints.rewritten(square(variant), tmp_path / case, method, **changes)
    model, source = load_packed(folder), load_packed(square(variant))
    assert sum(isinstance(module, Int4Linear) for module in model.modules()) == 14
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, source(TOKENS).logits)
    held = {module.weight.dtype for module in model.modules() if isinstance(module, Int4Linear)}
    assert held == {torch.bfloat16}


def test_an_adapter_trains_on_it_and_the_model_is_saved_as_compressed_tensors(square, tmp_path):
    from peft import LoraConfig, get_peft_model

    folder = other_checkpoints.rewritten(square("asym-g32"), tmp_path / "awq", "awq")
    model = load_packed(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    saved, before = open_checkpoint(tmp_path / "saved"), open_checkpoint(folder)
    saved.check_compressed_tensors("this test")
    for name in before.modules():
        mine, theirs = saved.packed_weight(name), before.packed_weight(name)
        for part in ("packed", "scale", "zero_point"):
            assert torch.equal(getattr(mine, part), getattr(theirs, part)), name
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4)
    peft = get_peft_model(model, config)
    peft(TOKENS, labels=TOKENS).loss.backward()
    gradients = [one.grad for name, one in peft.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_what_cannot_be_converted_is_named(square, tmp_path):
    changes = {"sym": False, "group_size": 32}  # version 1 stores a zero-point of 0 as -1
    folder = other_checkpoints.rewritten(square("asym-g32"), tmp_path / "gptq", "gptq", **changes)
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.layers\.\d.*qzeros"):
        load_packed(folder)


def test_keep_packed_refuses_the_words_of_another_model(square, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(square("g32"), dtype=torch.float32)
    other = other_checkpoints.rewritten(square("g128"), tmp_path / "gptq", "gptq", group_size=128)
    with pytest.raises(ValueError, match=r"qweight differs from the model's"):
        keep_packed(model, other)
