"""Log-probabilities of the served model against the float64 truth of transformers and PEFT."""

import pytest
import torch

from int4_lora.integration.checkpoint.open import open_checkpoint
from int4_lora.reference import dequantize
from support.engines import (
    COLD,
    COMPILED,
    FLAG,
    engine,
    layers_of,
    logprobs,
    next_logprobs,
    requests_of,
)
from support.served_truth import truth_and_allowed
from support.tiny import LLAMA

VARIANTS = [
    "g128",
    pytest.param("g32", marks=pytest.mark.nightly),
    pytest.param("asym-g128", marks=pytest.mark.nightly),
    pytest.param("channel", marks=pytest.mark.nightly),
]


def assert_served(llm, prompts, requests, rows, truth, allowed):
    """Check the log-probabilities of prompts, each with the request of its row."""
    answers = logprobs(llm, prompts, [requests[row] for row in rows])
    right = torch.stack([truth[row, number] for number, row in enumerate(rows)])
    error = (torch.tensor(answers, dtype=torch.float64) - right).abs().amax()
    assert error <= allowed, f"rows {rows}: {error:.4f} of {allowed:.4f} nats"


@pytest.mark.parametrize("variant", VARIANTS)
def test_base_one_adapter_and_mixed_rows(variant, tiny_models, tiny_adapters, prompts):
    model, folders = tiny_models[variant], list(tiny_adapters.values())
    truth, allowed = truth_and_allowed(model, folders, prompts)
    # an adapter without effect would not be missed
    assert ((truth[1:] - truth[:1]).abs().amax((1, 2)) > 5 * allowed).all()
    requests = [None, *requests_of(tiny_adapters).values()]
    with engine(model, enable_lora=True, max_loras=3, max_lora_rank=16, **COMPILED) as llm:
        for rows in ([0, 0, 0, 0], [2, 2, 2, 2], [0, 1, 2, 3]):
            assert_served(llm, prompts, requests, rows, truth, allowed)


def test_our_adapters_on_a_base_by_vllms_kernel_and_ours(
    tiny_models, tiny_adapters, prompts, monkeypatch
):
    """Few tokens by vLLM's kernel, many by ours on the same copy of an asymmetric weight."""
    from int4_lora.integration.vllm_plugin import scheme
    from int4_lora.integration.vllm_plugin.base_choice import VLLM, Choice, Plan
    from int4_lora.integration.vllm_plugin.lora_layers import Int4LoRALayer

    choice = Choice(Plan(VLLM, ours_from=25), "measured", "1.20 x")
    monkeypatch.setattr(scheme, "choice_of", lambda *_, **__: choice)
    model, folders = tiny_models["asym-g128"], list(tiny_adapters.values())
    truth, allowed = truth_and_allowed(model, folders, prompts)
    requests = [None, *requests_of(tiny_adapters).values()]
    with engine(model, enable_lora=True, max_loras=3, max_lora_rank=16, **FLAG) as llm:
        for rows in ([0, 1, 2, 3], [0, 0, 0, 0]):
            assert_served(llm, prompts, requests, rows, truth, allowed)
        layers = [layer for layer in layers_of(llm).values() if isinstance(layer, Int4LoRALayer)]
        assert all(layer.served.ours_from == 25 for layer in layers)
        checkpoint = open_checkpoint(model)
        down = next(layer for layer in layers if layer.served.name.endswith("1.mlp.down_proj"))
        dense = dequantize(checkpoint.packed_weight("model.layers.1.mlp.down_proj"))
        assert torch.equal(down.get_unpacked_weights(), dense)
        fused, *each = layers[0].served.engine.summary()
    assert fused.endswith("8 on vLLM's base kernel: 8 measured")
    assert sum(int(line.split()[0]) for line in each) == 8
    assert "by int4_lora above, from one copy, adapters by int4_lora: 1.20 x" in each[0]


@pytest.mark.nightly
def test_ranks_that_the_list_of_vllm_lacks(tiny_models, prompts, tmp_path):
    """They are padded to the rank of the slots."""
    from int4_lora.integration.demo import recipe

    model, folders = tiny_models["g128"], {}
    for rank in (12, 24, 48):
        settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
        folders[f"r{rank}"] = tmp_path / f"r{rank}"
        recipe.make_adapter(folders[f"r{rank}"], LLAMA, f"r{rank}", settings)
    truth, allowed = truth_and_allowed(model, list(folders.values()), prompts)
    assert ((truth[1:] - truth[:1]).abs().amax((1, 2)) > 5 * allowed).all()
    requests = [None, *requests_of(folders).values()]
    with engine(model, enable_lora=True, max_loras=3, max_lora_rank=64, **COLD) as llm:
        assert_served(llm, prompts, requests, [0, 1, 2, 3], truth, allowed)
        assert_served(llm, prompts, requests, [3, 2, 1, 0], truth, allowed)


@pytest.mark.versions
def test_a_request_is_answered_as_it_is_alone(tiny_models, tiny_adapters, prompts, tmp_path):
    from int4_lora.integration.demo import recipe

    folders = dict(tiny_adapters)
    for number in range(5):
        settings = {"r": 3 + number, "lora_alpha": 8, "target_modules": "all-linear"}
        recipe.make_adapter(tmp_path / f"own{number}", LLAMA, f"own{number}", settings)
        folders[f"own{number}"] = tmp_path / f"own{number}"
    assert len(folders) == 8
    requests = [None, *requests_of(folders).values()]
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1)).tolist()
    given = [(prompts[number % len(prompts)], requests[number % len(requests)]) for number in order]
    settings = {"enable_lora": True, "max_loras": 4, "max_cpu_loras": 8, "max_lora_rank": 16}
    with engine(tiny_models["g128"], **settings, **COMPILED) as llm:
        together = next_logprobs(llm, *zip(*given, strict=True))
        alone = [next_logprobs(llm, [prompt], [request])[0] for prompt, request in given]
    difference = (torch.tensor(together) - torch.tensor(alone)).abs().amax()
    assert difference <= 0.1  # nats: rounded to bfloat16 in another order


def test_adapters_on_embeddings_and_the_head(tiny_models, prompts, tmp_path):
    """VLLM's own layers: vLLM <= 0.32's CPU operators treat -1 as the last slot.

    The adapter is served as PEFT saved it, and as ``write_adapter`` writes what was read of it.
    """
    from int4_lora.integration import read_adapter, write_adapter
    from int4_lora.integration.demo import recipe

    folder, targets = tmp_path / "wide", ["q_proj", "embed_tokens", "lm_head"]
    recipe.make_adapter(
        folder, LLAMA, "wide", {"r": 4, "lora_alpha": 64, "target_modules": targets}
    )
    model = tiny_models["g128"]
    truth, allowed = truth_and_allowed(model, [folder], prompts)
    assert (truth[1] - truth[0]).abs().amax() > 5 * allowed
    write_adapter(tmp_path / "written", read_adapter(folder).modules)
    both = {"wide": folder, "written": tmp_path / "written"}
    requests, truth = [None, *requests_of(both).values()], truth[[0, 1, 1]]
    with engine(model, enable_lora=True, max_loras=2, max_lora_rank=8, **COMPILED) as llm:
        for rows in ([0, 1, 2, 0], [2, 2, 2, 2], [1, 1, 1, 1], [0, 0, 0, 0]):
            assert_served(llm, prompts, requests, rows, truth, allowed)
