"""Tiny models, as transformers makes them, and adapters that PEFT trained on them."""

import json
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

SAVED_BY_TODAYS_PEFT = pytest.mark.skipif(
    Version(version("transformers")) < Version("5") or Version(version("peft")) < Version("0.21"),
    reason="the files are those of PEFT 0.21 on transformers 5, which keeps experts in one tensor",
)
PEFT_WARNS = (
    ".*(rank|alpha)_pattern keys did not match",
    "target_modules=.*no module was matched",
    "Setting `save_embedding_layers`",
    "Model has `tie_word_embeddings",
    "ensure_weight_tying=True but the model",
    "You have requested `ensure_weight_tying`",
)
WITH_TODAYS_PEFT = [  # the marks of a file whose tests train adapters of every kind
    pytest.mark.versions,
    SAVED_BY_TODAYS_PEFT,
    *(pytest.mark.filterwarnings(f"ignore:{start}") for start in PEFT_WARNS),
]
QWEN3_MOE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "vocab_size": 80,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def llama(**changes):
    """Return a random Llama, the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})).eval()


def qwen3_moe(**changes):
    """Return a random Qwen3-MoE, the same at every call."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**QWEN3_MOE, **changes})).eval()


def trained(model, folder, steps=2, **settings):
    """Train an adapter with PEFT for some steps, save it, and return PEFT's model."""
    import peft

    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        tokens = torch.randint(model.config.vocab_size, (2, 12))
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.02)
    for _ in range(steps):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(str(folder))
    return model


def edit(folder, change=lambda tensors: None, **config):
    """Change the tensors of an adapter's folder in place, and members of its config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
