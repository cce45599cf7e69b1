"""Tiny INT4 Llamas in every variant that compressed-tensors 0.17 writes."""

GROUP = {"strategy": "group", "group_size": 128}
GROUP_32 = {"strategy": "group", "group_size": 32}
VARIANTS = {
    "g128": GROUP,
    "g32": GROUP_32,
    "asym-g128": {**GROUP, "symmetric": False},
    "asym-g32": {**GROUP_32, "symmetric": False},
    "channel": {"strategy": "channel"},
    "asym-channel": {"strategy": "channel", "symmetric": False},
    "actorder-g128": {**GROUP, "actorder": "group"},
    "actorder-weight-g128": {**GROUP, "actorder": "weight"},
    "w8-g128": {**GROUP, "num_bits": 8},
}
LLAMA = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def make_tiny(folder, variant):
    """Make one variant and return its folder."""
    from int4_lora.integration.demo import recipe

    weights = {"num_bits": 4, "type": "int", "symmetric": True, **VARIANTS[variant]}
    recipe.make_model(folder, LLAMA, weights)
    return folder
