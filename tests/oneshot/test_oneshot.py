"""What llm-compressor's ``oneshot`` writes: it opens, and every module verifies."""

import pytest
import torch
import transformers
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier

from int4_lora.integration import open_checkpoint
from int4_lora.integration.inspection import inspect
from int4_lora.integration.verification import verify
from support.tiny import LLAMA

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")  # its use of oneshot


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Return the folder of a small Llama in bfloat16; oneshot reads its config from there."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    config = transformers.LlamaConfig(**LLAMA)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("scheme", "bits", "symmetric"),
    [("W4A16", 4, True), ("W4A16_ASYM", 4, False), ("W8A16", 8, True)],
)
def test_oneshot(dense, tmp_path, scheme, bits, symmetric):
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    model = oneshot(model=model, recipe=recipe)
    model.save_pretrained(tmp_path / "written", save_compressed=True)
    checkpoint = open_checkpoint(tmp_path / "written")
    assert len(checkpoint.modules()) == 14
    assert {one.verdict for one in verify(checkpoint)} == {"same"}
    for one in inspect(checkpoint).modules:
        assert (one.bits, one.symmetric, one.packed) == (bits, symmetric, True)
        assert one.nan_scales == one.infinite_scales == 0
