"""Log-probabilities of the served model against the float64 truth of transformers and PEFT."""

import pytest
import torch
from serving.conftest import COMPILED, VOCABULARY, engine, logprobs, requests_of

from int4_lora.integration.checkpoint.open import open_checkpoint
from int4_lora.integration.demo.models import Float64Inside, peft_model, peft_name

VARIANTS = ["g128", "g32", "asym-g128", "channel"]
FLOOR = 0.02  # nats, beside twice what transformers errs in the same dtype


def peft_logprobs(model, folders, prompts, dtype):
    """Return log-probabilities [1 + adapters, prompts, 32] by transformers and PEFT."""
    whole = peft_model(open_checkpoint(model), folders, dtype)
    tokens, rows = torch.tensor(prompts), []
    for row in range(-1, len(folders)):
        if row >= 0:
            whole.set_adapter(peft_name(row))
        with torch.no_grad():
            if row < 0:
                with whole.disable_adapter():
                    logits = _logits(whole, tokens, dtype)
            else:
                logits = _logits(whole, tokens, dtype)
        each = logits[:, :-1].double().log_softmax(-1)
        rows.append(each.gather(2, tokens[:, 1:, None])[:, :, 0])
    return torch.stack(rows)


def _logits(whole, tokens, dtype):
    if dtype == torch.float64:
        with Float64Inside():
            return whole(tokens).logits
    return whole(tokens).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_base_one_adapter_and_mixed_rows(variant, tiny_models, tiny_adapters, prompts):
    model, folders = tiny_models[variant], list(tiny_adapters.values())
    truth = peft_logprobs(model, folders, prompts, torch.float64)
    theirs = peft_logprobs(model, folders, prompts, torch.bfloat16)
    allowed = 2 * (theirs - truth).abs().amax() + FLOOR
    requests = [None, *requests_of(tiny_adapters).values()]
    mixes = {
        "base": [0] * len(prompts),
        "one adapter": [2] * len(prompts),
        "mixed": [row % len(requests) for row in range(len(prompts))],
    }
    with engine(model, enable_lora=True, max_loras=3, max_lora_rank=16, **COMPILED) as llm:
        for name, rows in mixes.items():
            found = logprobs(llm, prompts, [requests[row] for row in rows])
            right = torch.stack([truth[row, number] for number, row in enumerate(rows)])
            error = (torch.tensor(found, dtype=torch.float64) - right).abs()
            assert error.amax() <= allowed, f"{name}: {error.amax():.4f} of {allowed:.4f} nats"


def test_adapters_change_the_answers_by_more_than_is_allowed(tiny_models, tiny_adapters, prompts):
    """What the test above would miss: an adapter that did nothing."""
    folders = list(tiny_adapters.values())
    truth = peft_logprobs(tiny_models["g128"], folders, prompts, torch.float64)
    theirs = peft_logprobs(tiny_models["g128"], folders, prompts, torch.bfloat16)
    allowed = 2 * (theirs - truth).abs().amax() + FLOOR
    assert ((truth[1:] - truth[:1]).abs().amax((1, 2)) > 5 * allowed).all()


def generated(llm, prompts, requests):
    """Return the log-probabilities of the whole vocabulary after each prompt."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=1, logprobs=VOCABULARY, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = llm.generate(prompts, asked, lora_request=requests, use_tqdm=False)
    first = [one.outputs[0].logprobs[0] for one in found]
    return [[one[token].logprob for token in range(VOCABULARY)] for one in first]


def test_a_request_is_answered_as_it_is_alone(tiny_models, tiny_adapters, prompts, tmp_path):
    from int4_lora.integration.demo import recipe
    from support.tiny import LLAMA

    folders = dict(tiny_adapters)
    for number in range(5):
        settings = {"r": 3 + number, "lora_alpha": 8, "target_modules": "all-linear"}
        recipe.make_adapter(tmp_path / f"own{number}", LLAMA, f"own{number}", settings)
        folders[f"own{number}"] = tmp_path / f"own{number}"
    assert len(folders) == 8
    requests = [None, *requests_of(folders).values()]
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1)).tolist()
    given = [(number % len(prompts), requests[number % len(requests)]) for number in order]
    settings = {"enable_lora": True, "max_loras": 4, "max_cpu_loras": 8, "max_lora_rank": 16}
    with engine(tiny_models["g128"], **settings, **COMPILED) as llm:
        together = generated(llm, [prompts[one] for one, _ in given], [each for _, each in given])
        alone = [generated(llm, [prompts[one]], [each])[0] for one, each in given]
    difference = (torch.tensor(together) - torch.tensor(alone)).abs().amax()
    assert difference <= 0.1  # nats: rounded to bfloat16 in another order


def test_adapters_on_embeddings_and_the_head(tiny_models, prompts, tmp_path):
    """Layers that stay vLLM's, whose CPU operators take a row without adapter for the last slot."""
    from int4_lora.integration.demo import recipe
    from support.tiny import LLAMA

    folder, targets = tmp_path / "wide", ["q_proj", "embed_tokens", "lm_head"]
    recipe.make_adapter(
        folder, LLAMA, "wide", {"r": 4, "lora_alpha": 64, "target_modules": targets}
    )
    model = tiny_models["g128"]
    truth = peft_logprobs(model, [folder], prompts, torch.float64)
    theirs = peft_logprobs(model, [folder], prompts, torch.bfloat16)
    allowed = 2 * (theirs - truth).abs().amax() + FLOOR
    assert (truth[1] - truth[0]).abs().amax() > 5 * allowed
    requests = [None, *requests_of({"wide": folder}).values()]
    with engine(model, enable_lora=True, max_loras=1, max_lora_rank=8, **COMPILED) as llm:
        for rows in ([0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]):
            found = logprobs(llm, prompts, [requests[row] for row in rows])
            right = torch.stack([truth[row, number] for number, row in enumerate(rows)])
            error = (torch.tensor(found, dtype=torch.float64) - right).abs()
            assert error.amax() <= allowed
