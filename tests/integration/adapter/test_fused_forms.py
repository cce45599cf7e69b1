"""Which of transformers' models stack q, k, v and gate, up as the mapping of forms assumes."""

import re
from pathlib import Path

import pytest
import transformers

from int4_lora.integration.adapter.fused_forms import OTHER_ORDERS

# Read, class by class: the rows of q, then k, then v; of gate, then up.
STACKED = {
    "qkv_proj": {"phi3", "phi4_multimodal"},
    "gate_up_proj": {
        "dia",
        "dots3_note",
        "esmfold2",
        "glm",
        "glm4",
        "glm4v",
        "glm_image",
        "glm_ocr",
        "minimax_m3_vl",
        "phi3",
        "phi4_multimodal",
        "zamba2",
    },
}


@pytest.mark.versions
@pytest.mark.parametrize("fused", STACKED)
def test_every_fused_linear_of_transformers_was_read(fused):
    """A model that is new in transformers: read how it splits the rows, and list it."""
    linear = re.compile(rf"self\.{fused} = nn\.Linear\(")
    models = {
        file.parent.name
        for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
        if linear.search(file.read_text(encoding="utf-8"))
    }
    assert models
    assert models <= STACKED[fused] | OTHER_ORDERS[fused].keys()


@pytest.mark.versions
def test_codegen_has_another_order():
    """What the model computes from qkv_proj changes when rows are taken for q, k and v."""
    import torch

    config = transformers.CodeGenConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=4, vocab_size=8)
    torch.manual_seed(0)
    block = transformers.CodeGenModel(config).eval().h[0].attn
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        block.qkv_proj.weight[:32] = 0  # were these the rows of q, scores would be all equal
        weights = block(x, None, position_ids=torch.arange(3)[None], output_attentions=True)[1]
    assert not torch.allclose(weights[..., 2, :], torch.full((3,), 1 / 3))
