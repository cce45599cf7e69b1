"""Weights whose columns are in the order of activations, which vLLM refuses."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import edit_config, weights
from support.engines import COLD, engine, logprobs, requests_of
from support.served_truth import truth_and_allowed

MERGED = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 2, "gate_proj": 3, "up_proj": 3}


def ordered(model, folder, actorder, order_of):
    """Copy a model and give each module an activation order."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        columns = int(tensors[f"{module}.weight_shape"][1])
        generator = torch.Generator().manual_seed(order_of(module.rpartition(".")[2]))
        order = torch.randperm(columns, generator=generator)
        tensors[f"{module}.weight_g_idx"] = (order // 128).to(torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, weights(actorder=actorder))
    return folder


@pytest.mark.versions
@pytest.mark.parametrize(
    ("variant", "actorder"),
    [("asym-g128", "group"), pytest.param("g128", "dynamic", marks=pytest.mark.nightly)],
)
def test_they_are_served_right(variant, actorder, tiny_models, tiny_adapters, prompts, tmp_path):
    """Modules that are merged have the inputs, and so the order, in common."""
    model = ordered(
        tiny_models[variant], tmp_path / "model", actorder, lambda name: MERGED.get(name, 4)
    )
    folders = list(tiny_adapters.values())
    truth, allowed = truth_and_allowed(model, folders, prompts)
    without, _ = truth_and_allowed(tiny_models[variant], [], prompts)
    assert (truth[0] - without[0]).abs().amax() > 5 * allowed  # the order matters
    requests, rows = [None, *requests_of(tiny_adapters).values()], [0, 1, 2, 3]
    with engine(model, enable_lora=True, max_loras=3, max_lora_rank=16, **COLD) as llm:
        answers = logprobs(llm, prompts, [requests[row] for row in rows])
    right = torch.stack([truth[row, number] for number, row in enumerate(rows)])
    assert (torch.tensor(answers, dtype=torch.float64) - right).abs().amax() <= allowed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "the modules that vLLM merges into model.layers.0.mlp.gate_up_proj have different"),
        ({"backend": "stock-base"}, "its shape or its activation order: leave out the option"),
    ],
)
def test_refused(options, sentence, tiny_models, tmp_path):
    def order_of(name):
        return MERGED.get(name, 4) if options else len(name) + ord(name[0])

    model = ordered(tiny_models["g128"], tmp_path / "model", "group", order_of)
    settings = {**COLD, "additional_config": {"int4_lora": {"warm_up": False, **options}}}
    with pytest.raises(Exception) as caught, engine(model, **settings):  # noqa: PT011
        pass
    assert sentence in str(caught.value)
