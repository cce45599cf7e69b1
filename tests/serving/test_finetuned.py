"""docs/fine-tuning.md in real vLLM: a text, an adapter trained on it, and equal answers everywhere.

The rule for a whole model is that of the demo: the largest error of a log-probability, against
transformers + PEFT in float64, is at most twice that of transformers + PEFT in bfloat16 on dense
weights, plus 0.02 nats.
"""

from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from typer.testing import CliRunner

from int4_lora.integration.cli.app import app
from int4_lora.integration.conversion import merge_checkpoint
from int4_lora.integration.huggingface import load_packed
from int4_lora.integration.huggingface.training import Settings, train
from support.engines import COLD, engine, logprobs, requests_of
from support.served_truth import truth_and_allowed

pytestmark = pytest.mark.nightly  # training, three engines and four merged or packed models
TEXT = Path(__file__).parents[2] / "docs" / "fine-tuning.md"
TOKENS = 33  # of a prompt: 32 of them are predicted


@pytest.fixture(scope="module")
def trained(demo_files, tmp_path_factory):
    """Train an adapter of the demo's model on a page of the documentation."""
    settings = Settings(steps=60, length=64, learning_rate=2e-3, eval_split=0.1, device="cpu")
    return train(demo_files.model, TEXT, tmp_path_factory.mktemp("trained") / "lora", settings)


@pytest.fixture(scope="module")
def text(demo_files):
    """Return the beginnings of four passages of the text, as tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_files.model)
    content = TEXT.read_text()
    starts = [content.index(f"\n## {title}") for title in ("Train", "Check", "Merge", "Memory")]
    return [tokenizer(content[start:])["input_ids"][:TOKENS] for start in starts]


@pytest.fixture(scope="module")
def truth(demo_files, trained, text):
    """Return the true scores of the text without and with the adapter, and the error allowed."""
    return truth_and_allowed(demo_files.model, [trained.output], text)


def served(model, text, adapter=None, **settings):
    """Return the scores of a text in vLLM."""
    more = {} if adapter is None else {"enable_lora": True, "max_lora_rank": 16}
    with engine(model, **more, **settings) as llm:
        request = None if adapter is None else requests_of({"trained": adapter})["trained"]
        scores = logprobs(llm, text, [request] * len(text))
    return torch.tensor(scores, dtype=torch.float64)


def scored(model, text):
    """Return the scores of a text in transformers."""
    tokens = torch.tensor(text)
    with torch.no_grad():
        each = model.eval()(tokens).logits[:, :-1].double().log_softmax(-1)
    return each.gather(2, tokens[:, 1:, None])[:, :, 0]


def test_the_adapter_has_learned_the_text_and_fits(demo_files, trained, truth):
    scores, allowed = truth
    assert scores[1].mean() > scores[0].mean() + 1  # nats per token
    assert (scores[1] - scores[0]).abs().amax() > 5 * allowed
    evaluations = [entry["loss"] for entry in trained.report["evaluations"]]
    assert evaluations[-1] < evaluations[0]
    arguments = ["inspect", str(demo_files.model), "--adapter", str(trained.output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "fits" in result.output


def test_transformers_scores_the_text_alike_with_packed_weights(demo_files, trained, text, truth):
    scores, allowed = truth
    model = PeftModel.from_pretrained(
        load_packed(demo_files.model, dtype=torch.bfloat16), trained.output
    )
    assert (scored(model, text) - scores[1]).abs().amax() <= allowed
    with model.disable_adapter():
        assert (scored(model, text) - scores[0]).abs().amax() <= allowed


def test_vllm_scores_the_text_alike_with_the_adapter(demo_files, trained, text, truth):
    scores, allowed = truth
    answers = served(demo_files.model, text, trained.output, **COLD)
    assert (answers - scores[1]).abs().amax() <= allowed


def test_the_dense_merged_model_scores_the_text_alike(demo_files, trained, text, truth, tmp_path):
    scores, allowed = truth
    merge_checkpoint(demo_files.model, tmp_path / "merged", [(trained.output, 1.0)])
    assert (served(tmp_path / "merged", text) - scores[1]).abs().amax() <= allowed
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.bfloat16
    )
    assert (scored(merged, text) - scores[1]).abs().amax() <= allowed


def test_the_int4_merged_model_keeps_what_was_learned(demo_files, trained, text, truth, tmp_path):
    """It is quantised again, so its own dequantised weights are its truth."""
    target = tmp_path / "merged"
    merge_checkpoint(demo_files.model, target, [(trained.output, 1.0)], to="int4")
    scores, allowed = truth_and_allowed(target, [], text)
    assert (served(target, text, **COLD) - scores[0]).abs().amax() <= allowed
    packed = load_packed(target, dtype=torch.bfloat16)
    assert (scored(packed, text) - scores[0]).abs().amax() <= allowed
    base, learned = truth[0][0].mean(), truth[0][1].mean()
    assert scores[0].mean() > base + 0.9 * (learned - base)
