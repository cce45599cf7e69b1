"""A quantised embedding and a quantised lm_head, with adapters elsewhere and on them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from int4_lora.reference import quantize
from support.checkpoints import edit_config
from support.engines import COLD, engine, logprobs, requests_of, run_in_process
from support.served_truth import truth_and_allowed
from support.tiny import LLAMA

SETTINGS = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, **COLD}
MODULES = {"lm_head": "re:.*lm_head", "model.embed_tokens": "Embedding"}  # vLLM asks by class


@pytest.fixture(scope="module")
def model(tiny_models, tmp_path_factory):
    """Return a tiny model whose embedding and head are INT4 as well."""
    folder = shutil.copytree(tiny_models["g128"], tmp_path_factory.mktemp("vocabulary") / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in MODULES:
        weight = quantize(tensors.pop(f"{name}.weight"), group_size=128)
        tensors[f"{name}.weight_packed"] = weight.packed
        tensors[f"{name}.weight_scale"] = weight.scale
        tensors[f"{name}.weight_shape"] = torch.tensor(weight.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def target(_, quantization):
        quantization["ignore"] = []
        quantization["config_groups"]["group_0"]["targets"] += list(MODULES.values())

    edit_config(folder, target)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    from int4_lora.integration.demo import recipe

    root, targets = tmp_path_factory.mktemp("adapters"), ["q_proj", "embed_tokens", "lm_head"]
    for name, modules in {"elsewhere": ["q_proj", "down_proj"], "everywhere": targets}.items():
        settings = {"r": 4, "lora_alpha": 64, "target_modules": modules}
        recipe.make_adapter(root / name, LLAMA, name, settings)
    return {name: root / name for name in ("elsewhere", "everywhere")}


@pytest.mark.versions
def test_answers_are_right(model, adapters, prompts):
    truth, allowed = truth_and_allowed(model, list(adapters.values()), prompts)
    assert ((truth[1:] - truth[:1]).abs().amax((1, 2)) > 5 * allowed).all()
    requests = [None, *requests_of(adapters).values()]
    with engine(model, **SETTINGS) as llm:
        for rows in ([0, 1, 2, 0], [2, 2, 2, 2], [0, 0, 0, 0]):
            answers = logprobs(llm, prompts, [requests[row] for row in rows])
            right = torch.stack([truth[row, number] for number, row in enumerate(rows)])
            assert (torch.tensor(answers, dtype=torch.float64) - right).abs().amax() <= allowed


@pytest.mark.nightly
def test_within_the_graph_of_vllm(model, prompts, tmp_path):
    eager, output = run_in_process(tmp_path, model, {}, prompts, COLD)
    assert eager is not None, output
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm")}
    settings = {**COLD, "enforce_eager": False}
    compiled, output = run_in_process(tmp_path, model, {}, prompts, settings, **env)
    assert compiled is not None, output
    assert (torch.tensor(compiled) - torch.tensor(eager)).abs().max() <= 0.1
