"""A hundred steps on a packed model follow PEFT's on the dense float32 weights it stands for.

The models learn which few tokens occur. Where they learn random tokens by heart instead, rounding
steers the training: PEFT on dense bfloat16 weights then ends up to 0.08 nats from float32.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from int4_lora.compiled import formulation_for
from int4_lora.integration.huggingface import Int4Linear, load_packed
from int4_lora.reference import dequantize
from support.tiny import SQUARE, make_tiny

pytestmark = pytest.mark.nightly

STEPS = 100
USED = 8  # tokens that occur
BATCH = (4, 16)  # sequences, tokens
LAYOUTS = {  # of a variant of support.tiny
    "g128": "Int4PackWeight",
    "asym-g32": "InterleavedWeight",
    "w8-g128": "Int8Weight",
}
SETTINGS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def layers_of(model):
    """Return the packed layers of a model by their names."""
    return {name: one for name, one in model.named_modules() if isinstance(one, Int4Linear)}


def dense_model(folder, packed):
    """Return the model in float32, its weights dequantised by the reference."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = {
        name: tensor.float()
        for name, tensor in packed.state_dict().items()
        if ".weight_" not in name
    }
    for name, layer in layers_of(packed).items():
        tensors[f"{name}.weight"] = dequantize(layer.packed_weight(), torch.float32)
    model.load_state_dict(tensors)
    return model


def losses_of(model):
    """Train adapters on the same batches from the same seed; return the loss of each step."""
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**SETTINGS)).train()
    trained = [one for one in model.parameters() if one.requires_grad]
    assert all(one.dtype == torch.float32 for one in trained)
    optimiser = torch.optim.AdamW(trained, lr=5e-4)
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(USED, (4, *BATCH), generator=generator)
    found = []
    for step in range(STEPS):
        tokens = batches[step % len(batches)]
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request, tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("long") / request.param, request.param, SQUARE)


@pytest.fixture(scope="module")
def expected(folder):
    """Return the losses of PEFT on the dense float32 model."""
    losses = losses_of(dense_model(folder, load_packed(folder, dtype=torch.float32)))
    assert losses[-1] < losses[0] - 1  # it learns
    return losses


def test_in_float32_every_loss_is_peft_s(folder, expected):
    model = load_packed(folder, dtype=torch.float32)
    tokens = BATCH[0] * BATCH[1]
    for layer in layers_of(model).values():
        assert type(layer.prepared).__name__ == LAYOUTS[folder.name]
        assert formulation_for(layer.prepared, torch.float32, tokens).weight_rounded
    assert ((losses_of(model) - expected).abs() <= 1e-4 * expected).all()


def test_in_bfloat16_the_last_losses_are_peft_s(folder, expected):
    losses = losses_of(load_packed(folder, dtype=torch.bfloat16))
    assert (losses[-4:].mean() - expected[-4:].mean()).abs() <= 0.01
