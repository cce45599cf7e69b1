"""Tiny INT4 checkpoints of the families of models that people have, and their dense twins.

Names and config are what transformers writes for the family. Codes, scales and dense weights are
those of ``support.layouts``, packed and computed by hand.
"""

import json
import re

import torch
from safetensors.torch import load_file

from support.layouts import Model, group, quantization, write_tensors

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {**TEXT, "num_hidden_layers": 1, "num_experts_per_tok": 2}
FAMILIES = {
    "Llama": ("LlamaForCausalLM", TEXT),
    "Llama, tied": ("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": True}),
    "Mistral": ("MistralForCausalLM", {**TEXT, "sliding_window": 4}),
    "Qwen2": ("Qwen2ForCausalLM", TEXT),
    "Qwen3": ("Qwen3ForCausalLM", TEXT),
    "Gemma 2": ("Gemma2ForCausalLM", {**TEXT, "sliding_window": 4, "tie_word_embeddings": True}),
    "Gemma 3": ("Gemma3ForCausalLM", {**TEXT, "sliding_window": 4, "tie_word_embeddings": True}),
    "Phi-3": ("Phi3ForCausalLM", TEXT),
    "Mixtral": ("MixtralForCausalLM", {**MOE, "num_local_experts": 4}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {**MOE, "num_experts": 4, "moe_intermediate_size": 64}),
    "DeepSeek-V3": (  # sigmoid routing, a shared expert, and a dense layer first
        "DeepseekV3ForCausalLM",
        {
            **MOE,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 64,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "head_dim": 8,
        },
    ),
    "Llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "projection_dim": 32,
            },
            "vision_feature_layer": -1,
            "image_token_index": 95,
        },
    ),
    "Qwen2-VL": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "rope_scaling": {
                    "type": "default",
                    "rope_type": "default",
                    "mrope_section": [2, 3, 3],
                },
            },
            "vision_config": {
                "depth": 1,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 2,
                "mlp_ratio": 1,
                "patch_size": 4,
            },
            "image_token_id": 94,
            "video_token_id": 95,
            "vision_start_token_id": 92,
            "vision_end_token_id": 93,
        },
    ),
}
TOWERS = ("vision_tower", "visual", "multi_modal_projector")
EXACT = 7  # scales of 3 bits, so that bfloat16 holds every product with a code
EXPERTS = ("Mixtral", "Qwen3-MoE", "DeepSeek-V3")
LINEAR = re.compile(
    r"\.((q|k|v|o|qkv|gate|up|down|gate_up|[qk]v?_[ab])_proj(_with_mqa)?|w[123])\.weight$"
)
IGNORE = [
    "lm_head",
    *(f"re:.*{tower}.*" for tower in TOWERS),
    "re:.*mlp.gate$",
    "re:.*block_sparse_moe.gate$",
]


def make_family(folder, name, **how):
    """Make the checkpoints ``folder/int4`` and ``folder/dense`` of a family.

    Args:
        folder: where to write them.
        name: one of ``FAMILIES``.
        how: arguments of ``Model.packed``.

    Returns:
        The names that the INT4 checkpoint gives its packed modules.
    """
    import transformers

    architecture, settings = FAMILIES[name]
    kind = getattr(transformers, architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(kind.config_class(**settings)).to(torch.bfloat16)
        for key, one in model.named_parameters():
            if key.endswith("bias"):
                one.data.normal_(std=0.1)
        for key, one in model.named_buffers():
            if key.endswith("e_score_correction_bias"):  # of the router, stored in float32
                one.data = torch.rand(one.shape) / 8
    model.save_pretrained(folder / "dense")
    stored = load_file(folder / "dense" / "model.safetensors")
    made = Model()
    for key, tensor in stored.items():
        if LINEAR.search(key) and not any(tower in key for tower in TOWERS):
            made.packed(key.removesuffix(".weight"), *tensor.shape, scales=EXACT, **how)
        else:
            made.put(key, tensor)
    write_tensors(folder / "dense" / "model.safetensors", made.dense)
    config = json.loads((folder / "dense" / "config.json").read_text())
    groups = {"group_0": group(symmetric=not how.get("zero_points", False))}
    made.save(folder / "int4", quantization(groups, ignore=IGNORE), config)
    suffix = ".weight_packed"
    return [key.removesuffix(suffix) for key in made.stored if key.endswith(suffix)]
