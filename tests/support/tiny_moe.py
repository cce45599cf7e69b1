"""Tiny INT4 mixtures of experts and their adapters, made by the tools that make large ones.

transformers writes the dense checkpoint, with a module for each expert; compressed-tensors
quantises these modules; PEFT writes the adapters.
"""

import contextlib
import json
import re

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from int4_lora.integration.checkpoint.open import open_checkpoint
from int4_lora.reference import dequantize
from support.tiny import VARIANTS

TEXT = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}
FAMILIES = {
    "qwen3": (
        "Qwen3MoeForCausalLM",
        {
            **TEXT,
            "intermediate_size": 256,
            "moe_intermediate_size": 256,
            "num_experts": 8,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {**TEXT, "intermediate_size": 256, "num_local_experts": 4, "sliding_window": None},
    ),
}
SCHEMES = {**VARIANTS, "g64": {"strategy": "group", "group_size": 64}}
QUANTISED = re.compile(r"\.(?:[qkvo]_proj|experts\.\d+\.(?:(?:gate|up|down)_proj|w[123]))\.weight$")
IGNORED = ["lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$"]
SCALE = 3.0  # times transformers' initial weights of experts, so that experts are not a side issue


def make_tiny_moe(folder, variant="g128", family="qwen3"):
    """Make an INT4 checkpoint and return its folder."""
    from compressed_tensors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    from int4_lora.integration.demo.recipe import _calibrate

    _dense_model(family).save_pretrained(folder)
    file = folder / "model.safetensors"
    stored = load_file(file)
    linears = {name: weight for name, weight in stored.items() if QUANTISED.search(name)}
    tree = _tree({name.removesuffix(".weight"): weight for name, weight in linears.items()})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, **SCHEMES[variant]}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    apply_quantization_config(
        tree,
        QuantizationConfig(
            config_groups={"group_0": scheme},
            ignore=IGNORED,
            quantization_status=QuantizationStatus.FROZEN,
        ),
    )
    for name, module in tree.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            _calibrate(name, module)
    compressor = ModelCompressor.from_pretrained_model(tree)
    compressor.compress_model(tree)
    packed = {name: tensor.contiguous() for name, tensor in tree.state_dict().items()}
    others = {name: tensor for name, tensor in stored.items() if name not in linears}
    save_file({**others, **packed}, file, metadata={"format": "pt"})
    compressor.update_config(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = IGNORED
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _dense_model(family):
    """Return a random model whose weight rows have offsets, so that zero-points matter."""
    import transformers

    architecture, settings = FAMILIES[family]
    kind = getattr(transformers, architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(kind.config_class(**settings)).to(torch.bfloat16).eval()
        for name, weight in model.named_parameters():
            if weight.ndim == 3:  # of experts
                weight.data *= SCALE
            if weight.ndim == 3 or name.endswith("proj.weight"):
                offsets = 0.02 * torch.randn(*weight.shape[:-1], 1)
                weight.data.add_(offsets.to(weight.dtype))
    return model


@torch.no_grad()
def _tree(weights):
    """Return a model of linear layers under the names of a checkpoint."""
    root = nn.Module()
    for name, weight in weights.items():
        *parents, last = name.split(".")
        place = root
        for part in parents:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        linear.weight.copy_(weight)
        place.add_module(last, linear)
    return root


def write_dense_twin(model, folder, deltas=None):
    """Write the dequantised checkpoint, to which float64 deltas are added by module's name.

    Without deltas the weights keep the scales' dtype, which holds them exactly.
    """
    checkpoint = open_checkpoint(model)
    modules = set(checkpoint.modules())
    tensors = {
        name: checkpoint.tensor(name)
        for name in checkpoint.tensors
        if name.rpartition(".")[0] not in modules
    }
    for module in modules:
        tensors[f"{module}.weight"] = dequantize(checkpoint.packed_weight(module))
    for module, delta in (deltas or {}).items():
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"].double() + delta
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load_dense(folder, dtype, adapter=None):
    """Return transformers' model of a dense folder, with PEFT's adapter."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    if dtype == torch.float64:
        model = model.to(dtype)  # rotary buffers too
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    return model.eval()


ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
ADAPTERS = {
    "attention": {"r": 8, "lora_alpha": 16, **ATTENTION},
    "experts": {"r": 4, "lora_alpha": 8, **EXPERTS},
    "both": {"r": 6, "lora_alpha": 4, **ATTENTION, **EXPERTS},
}


def make_moe_adapter(folder, dense, name, settings):
    """Make a random adapter of PEFT, B included, on the dense twin of a model."""
    import peft

    model = load_dense(dense, torch.bfloat16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(name.encode()))
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        made = peft.get_peft_model(model, config)
        for key, tensor in made.named_parameters():
            if "lora_B" in key:
                tensor.data.normal_(std=0.05)
        made.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


DECISIVE = 0.015  # of a router's logits, whose error in bfloat16 is a fifth of that
FLOOR = 0.02  # nats, beside twice the error of transformers in bfloat16


class MoETruth:
    """What transformers and PEFT say of a base and its adapters, on prompts of decisive routing.

    In bfloat16 a token whose k-th and next expert are nearly as likely may be given the other, in
    every implementation at another token. No bound passes through that, so that the prompts are
    those on which the router decides clearly in float64, with each adapter and without.

    Args:
        models: of float64 and of bfloat16, the base first.
        count: how many prompts.
        length: tokens of each.
    """

    def __init__(self, models, count=4, length=8):
        wide, narrow = models
        self.prompts = decisive_prompts(wide, count, length)
        self.logprobs = _logprobs(wide, self.prompts)  # [1 + adapters, prompts, tokens]
        error = (_logprobs(narrow, self.prompts) - self.logprobs).abs().amax()
        self.allowed = 2 * error + FLOOR


def moe_truth(dense, folders=(), **arguments):
    """Return the truth of a dense twin and adapters of PEFT."""
    return MoETruth(
        [
            [load_dense(dense, dtype, folder) for folder in (None, *folders)]
            for dtype in (torch.float64, torch.bfloat16)
        ],
        **arguments,
    )


def decisive_prompts(models, count, length, candidates=4096):
    """Return prompts at none of whose tokens any model's router is undecided."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, TEXT["vocab_size"], (candidates, length), generator=generator)
    for model in models:
        k = TEXT["num_experts_per_tok"]
        margins = []
        for router in _outputs(model, tokens).router_logits:
            best = router.sort(dim=1, descending=True).values
            margins.append((best[:, k - 1] - best[:, k]).reshape(len(tokens), length).amin(1))
        tokens = tokens[torch.stack(margins).amin(0) >= DECISIVE]
    assert len(tokens) >= count, f"{len(tokens)} of {candidates} prompts"
    return tokens[:count].tolist()


def _logprobs(models, prompts):
    """Return the log-probability of each token of each prompt after the first: float64."""
    tokens, rows = torch.tensor(prompts), []
    for model in models:
        each = _outputs(model, tokens).logits[:, :-1].double().log_softmax(-1)
        rows.append(each.gather(2, tokens[:, 1:, None])[:, :, 0])
    return torch.stack(rows)


def _outputs(model, tokens):
    from int4_lora.integration.demo.models import Float64Inside

    inside = Float64Inside() if model.dtype == torch.float64 else contextlib.nullcontext()
    with torch.no_grad(), inside:
        return model(tokens, output_router_logits=True)
