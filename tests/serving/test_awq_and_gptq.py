"""AWQ and GPTQ checkpoints, converted while vLLM loads them; what cannot be, by name."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import other_checkpoints
from support.activation_order import ordered
from support.engines import COLD, engine, layers_of, logprobs, requests_of
from support.served_truth import truth_and_allowed

V2 = {"checkpoint_format": "gptq_v2", "sym": False}
CASES = {  # the model whose weights are written again, the method, fields of its config
    "awq": ("asym-g32", "awq", {}),
    "gptq": ("g128", "gptq", {"group_size": 128}),
    "gptq_desc_act": ("g128", "gptq", {"group_size": 128, "desc_act": True}),
    "gptq_v2": ("asym-channel", "gptq", {**V2, "group_size": -1}),
    "gptq_8_bits": ("w8-g128", "gptq", {"group_size": 128, "bits": 8}),
}


@pytest.mark.versions
@pytest.mark.parametrize(
    "case", ["awq", "gptq_desc_act", *(pytest.param(name, marks=pytest.mark.nightly)
                                       for name in ("gptq", "gptq_v2", "gptq_8_bits"))]
)  # fmt: skip
def test_they_are_served_right(case, tiny_models, tiny_adapters, prompts, tmp_path):
    variant, method, changes = CASES[case]
    source = tiny_models[variant]
    if changes.get("desc_act"):
        source = ordered(source, tmp_path / "ordered")
    model = other_checkpoints.rewritten(source, tmp_path / case, method, **changes)
    truth, allowed = truth_and_allowed(source, list(tiny_adapters.values()), prompts)
    requests, rows = [None, *requests_of(tiny_adapters).values()], [0, 1, 2, 3]
    with engine(model, enable_lora=True, max_loras=3, max_lora_rank=16, **COLD) as llm:
        answers = logprobs(llm, prompts, [requests[row] for row in rows])
        layers = layers_of(llm)
    right = torch.stack([truth[row, number] for number, row in enumerate(rows)])
    assert (torch.tensor(answers, dtype=torch.float64) - right).abs().amax() <= allowed
    held = {name for layer in layers.values() for name in layer._parameters}
    assert not held & {"qweight", "qzeros", "scales", "g_idx"}  # one copy


@pytest.mark.parametrize(
    ("variant", "method", "changes"),
    [
        ("g128", "gptq", {"group_size": 128, "desc_act": True}),
        pytest.param("g128", "gptq", {"group_size": 128}, marks=pytest.mark.nightly),
        pytest.param("asym-g32", "awq", {}, marks=pytest.mark.nightly),
    ],
)
def test_weights_are_loaded_again(variant, method, changes, tiny_models, prompts, tmp_path):
    """Also the activation order, which every module merged into a layer loads."""
    source = tiny_models[variant]
    if changes.get("desc_act"):
        source = ordered(source, tmp_path / "ordered")
    model = other_checkpoints.rewritten(source, tmp_path / "model", method, **changes)
    other = shutil.copytree(model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".scales"):
            tensors[name] = 2 * tensor
        if name.endswith("down_proj.g_idx") and changes.get("desc_act"):
            tensors[name] = tensor.roll(1)
    save_file(tensors, other / "model.safetensors")
    with engine(other, **COLD) as llm:
        right = logprobs(llm, prompts[:1], [None])
    with engine(model, **COLD) as llm:
        before = logprobs(llm, prompts[:1], [None])
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert logprobs(llm, prompts[:1], [None]) == right != before
        layers = layers_of(llm)
    held = {name for layer in layers.values() for name in layer._parameters}
    assert not held & {"qweight", "qzeros", "scales", "g_idx"}


@pytest.mark.parametrize(
    ("method", "change", "sentences"),
    [
        ("gptq", {"dynamic": {"-:lm_head": {}}}, ("dynamic of a gptq", "int4-lora convert")),
        ("gptq", {"lm_head": True}, ("lm_head of a gptq", "int4-lora convert")),
        ("gptq", {"bits": 3}, ("bits must be 4 or 8 to be read, got 3",)),
        ("gptq", {"checkpoint_format": "marlin"}, ("not those packed for a kernel",)),
        ("awq", {"version": "gemv"}, ("version must be 'gemm', got 'gemv'",)),
    ],
)
def test_refused(method, change, sentences):
    from int4_lora.integration.vllm_plugin.other_methods import read_source

    with pytest.raises(ValueError, match=r"must|describes") as refused:
        read_source({**other_checkpoints.CONFIGS[method], **change})
    assert all(sentence in str(refused.value) for sentence in sentences)


def test_a_stored_zero_that_no_int4_weight_has_stops_the_start(tiny_models, tmp_path):
    """Of asymmetric GPTQ, version 1: a zero-point of 0 is stored as -1, which reads as 16."""
    changes = {"sym": False, "group_size": 32}
    model = other_checkpoints.rewritten(
        tiny_models["asym-g32"], tmp_path / "model", "gptq", **changes
    )
    with pytest.raises(Exception) as caught, engine(model, **COLD):  # noqa: PT011
        pass
    assert "int4_lora: model.layers.0" in str(caught.value)
    assert "GPTQ file of version 1" in str(caught.value)


def test_an_activation_order_that_is_missing_stops_the_start(tiny_models, tmp_path):
    """Without an order, which vLLM may have dropped, columns would be in the wrong groups."""
    source = ordered(tiny_models["g128"], tmp_path / "ordered")
    changes = {"group_size": 128, "desc_act": True}
    model = other_checkpoints.rewritten(source, tmp_path / "model", "gptq", **changes)
    file = model / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if not n.endswith("g_idx")}, file)
    with pytest.raises(Exception) as caught, engine(model, **COLD):  # noqa: PT011
        pass
    assert "qkv_proj has no g_idx, where config.json says desc_act true" in str(caught.value)
