"""The layers of an engine with the flag, and the weights that are read back from them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from int4_lora.integration.checkpoint.open import open_checkpoint
from int4_lora.integration.vllm_plugin.served_layer import ServedLayer
from int4_lora.reference import dequantize
from support.engines import COLD, engine, layers_of, logprobs, requests_of

pytestmark = pytest.mark.versions

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 16}


def linears(llm):
    return {
        name: module
        for name, module in layers_of(llm).items()
        if isinstance(getattr(module, "int4_lora", None), ServedLayer)
        and not hasattr(module, "base_layer")
    }


def expected(checkpoint, name):
    parent, _, last = name.replace(".base_layer", "").rpartition(".")
    parts = MERGED.get(last, [last])
    return torch.cat([dequantize(checkpoint.packed_weight(f"{parent}.{part}")) for part in parts])


def with_shapes(dtype, model, copy):
    """Copy a checkpoint and store ``weight_shape`` in another dtype; return the copy."""
    shutil.copytree(model, copy)
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_shape")]:
        tensors[name] = tensors[name].to(dtype)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("backend", ["compiled", "stock-base"])
@pytest.mark.parametrize(
    "variant", ["asym-g32", pytest.param("channel", marks=pytest.mark.nightly)]
)
def test_unpacked_weights_are_the_checkpoints(variant, backend, tiny_models, tmp_path):
    """Also with shapes stored as int32, as Kimi K2's are."""
    from int4_lora.integration.vllm_plugin.lora_layers import Int4LoRALayer

    options = {"backend": backend, "cache_bytes": 2**22, "warm_up": False}
    settings = {"quantization": "int4_lora", "additional_config": {"int4_lora": options}}
    model = tiny_models[variant]
    if variant == "channel":
        model = with_shapes(torch.int32, model, tmp_path / "copied")
    checkpoint = open_checkpoint(model)
    with engine(model, **LORA, **settings) as llm:
        wrapped = {
            name: module
            for name, module in layers_of(llm).items()
            if isinstance(module, Int4LoRALayer)
        }
        assert len(wrapped) == 8
        for name, module in wrapped.items():
            assert module._check_int4_quantization()
            dense = module.get_unpacked_weights()
            assert torch.equal(dense, expected(checkpoint, name))
            assert module.get_unpacked_weights() is dense  # from the cache
            assert module.get_unpacked_weights(torch.float32).dtype == torch.float32


def test_scales_keep_the_checkpoints_dtype(tiny_models):
    """A model served in float16 keeps bfloat16 scales: vLLM casts them, and loses bits."""
    checkpoint = open_checkpoint(tiny_models["g128"])
    with engine(tiny_models["g128"], dtype="float16", **COLD) as llm:
        for name, module in linears(llm).items():
            packed = module.int4_lora.weight.packed_weight()
            assert packed.scale.dtype == torch.bfloat16
            assert torch.equal(dequantize(packed), expected(checkpoint, name))


def test_the_log_counts_the_layers_and_a_weight_is_in_memory_once(tiny_models):
    with engine(tiny_models["g128"], **LORA, **COLD) as llm:
        served_engine = next(iter(linears(llm).values())).int4_lora.engine
        assert served_engine.summary() == ["8 of 8 linear layers fused (INT4 base, adapters)"]
        for module in linears(llm).values():
            prepared = module.int4_lora.weight
            codes = prepared.in_features * prepared.out_features // 2
            scales = 2 * prepared.out_features * prepared.in_features // 128
            assert prepared.nbytes <= codes + 2 * scales  # the scales twice in torch's layout
            assert sum(tensor.nbytes for tensor in module.parameters()) < codes / 8


def test_without_the_flag_nothing_changes(tiny_models, tiny_adapters, prompts, monkeypatch):
    requests = list(requests_of(tiny_adapters).values())[:2]
    rows = [requests[number % 2] for number in range(len(prompts))]
    with engine(tiny_models["g128"], **LORA) as llm:
        classes = {name: type(module) for name, module in layers_of(llm).items()}
        answers = logprobs(llm, prompts, rows)
    monkeypatch.setenv("VLLM_PLUGINS", "")
    with engine(tiny_models["g128"], **LORA) as llm:
        assert {name: type(module) for name, module in layers_of(llm).items()} == classes
        assert logprobs(llm, prompts, rows) == answers
    assert not any(layer.__module__.startswith("int4_lora") for layer in classes.values())


def test_scales_of_another_dtype_are_tried_as_they_are(tiny_models, monkeypatch):
    """With ``auto`` a layer is measured with the scales' dtype that it is served with."""
    from int4_lora.integration.vllm_plugin import scheme
    from int4_lora.integration.vllm_plugin.base_choice import VLLM, Choice, Plan

    kinds = []

    def trial(kind, device, favour, may_share):
        kinds.append(kind)
        assert may_share == (kind.scale_dtype == kind.dtype)  # vLLM's kernel casts the scales
        slower = kind.scale_dtype != kind.dtype
        return Choice(Plan(VLLM), "measured slower") if slower else Choice()

    monkeypatch.setattr(scheme, "choice_of", trial)
    settings = {"quantization": "int4_lora", "dtype": "float16"}
    settings["additional_config"] = {"int4_lora": {"backend": "auto", "warm_up": False}}
    with engine(tiny_models["g128"], **settings) as llm:
        reasons = {module.int4_lora.fallback_reason for module in linears(llm).values()}
    assert {kind.scale_dtype for kind in kinds} == {torch.float16, torch.bfloat16}
    assert reasons == {"measured slower"}


def test_a_padded_vocabulary_and_prompts(one_rank):
    """Logits are padded to 64; log-probabilities of a prompt are rows of one request."""
    from types import SimpleNamespace

    from int4_lora.integration.vllm_plugin.vocabulary import VocabularyAdapters

    operators = SimpleNamespace(sampler_indices=torch.tensor([1]))
    adapters = VocabularyAdapters(operators)
    a, b = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 100, 4)
    x, y = torch.randn(3, 8), torch.zeros(3, 128)
    adapters.add_lora_logits(y, x, a, b, 1.0)
    assert not y.any()  # no slot holds weights for it
    adapters.slots.add(1)
    adapters.add_lora_logits(y, x, a, b, 1.0)
    torch.testing.assert_close(y[:, :100], x @ a[1, 0].T @ b[1, 0].T)
    assert not y[:, 100:].any()
    operators.sampler_indices = torch.tensor([1, 0])
    with pytest.raises(ValueError, match="3 rows of 2 requests"):
        adapters.add_lora_logits(y, x, a, b, 1.0)
