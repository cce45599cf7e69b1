"""What ``write_adapter`` writes is, as vLLM loads and packs it, what was given."""

from types import SimpleNamespace

import pytest
import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper

from int4_lora.integration import AdapterModule, read_adapter, write_adapter
from int4_lora.integration.adapter.quantize import dequantize_adapter, quantize_adapter
from support.engines import COLD, engine, next_logprobs, requests_of

EXPERTS = "model.layers.0.mlp.experts"
SHAPES = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
FUSED = {"gate_up_proj": (64, 64), "down_proj": (64, 32)}
COUNT = 3


def pair(rows, columns, rank=4, scaling=2.0, seed=0):
    """Return a random pair, of a seed of its own."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(rank, columns, generator=generator),
        torch.randn(rows, rank, generator=generator),
    )
    return AdapterModule(a, b, scaling)


def experts(shapes):
    """Return a pair for each projection of every expert."""
    names = [(expert, part) for expert in range(COUNT) for part in shapes]
    return {
        f"{EXPERTS}.{expert}.{part}": pair(*shapes[part], seed=seed)
        for seed, (expert, part) in enumerate(names)
    }


def loaded(folder, modules, expected, **options):
    """Write an adapter, and load it with vLLM as for a model with the modules ``expected``."""
    write_adapter(folder, modules, **options)
    return LoRAModel.from_local_checkpoint(
        str(folder),
        {*expected},
        PEFTHelper.from_local_dir(str(folder), None),
        lora_model_id=1,
        device="cpu",
        dtype=torch.float32,
    )


def delta(b, a, scaling):
    return scaling * (b @ a)


def assert_same(ours, module):
    torch.testing.assert_close(ours, delta(module.b, module.a, module.scaling))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scalings_of_every_layer(tmp_path, use_rslora):
    ranks = {"q_proj": 4, "k_proj": 2, "xq_proj": 6}
    modules = {
        f"model.layers.{layer}.self_attn.{name}": pair(
            48, 64, rank, 3 / rank ** (0.5 if use_rslora else 1) * (1 + layer), seed=layer
        )
        for layer in range(12)
        for name, rank in ranks.items()
    }
    lora = loaded(tmp_path / "x", modules, ranks)
    assert lora.loras.keys() == modules.keys()
    for name, module in modules.items():
        theirs = lora.loras[name]
        assert theirs.rank == module.a.shape[0]
        assert_same(delta(theirs.lora_b, theirs.lora_a, theirs.scaling), module)


def test_a_pair_of_the_embeddings(tmp_path):
    modules = {"model.embed_tokens": pair(48, 64), "lm_head": pair(48, 64, seed=1)}
    lora = loaded(tmp_path / "x", modules, ["embed_tokens", "lm_head"])
    for name, module in modules.items():
        theirs = lora.loras[name]
        product = theirs.lora_b @ theirs.lora_a  # of the embeddings, the transpose of what is added
        ours = product.T if name == "model.embed_tokens" else product
        assert_same(theirs.scaling * ours, module)


@pytest.mark.parametrize("shapes", [SHAPES, FUSED], ids=["gate and up", "gate_up_proj"])
def test_separate_experts(tmp_path, shapes):
    modules = experts(shapes)
    names = [f"experts.{expert}.{part}" for expert in range(COUNT) for part in SHAPES]
    lora = loaded(tmp_path / "x", modules, [*names, "experts"], experts="separate")
    order = [
        f"{EXPERTS}.{e}.{part}"
        for e in range(COUNT)
        for part in ("gate_proj", "down_proj", "up_proj")
    ]
    packed = PackedLoRALayerWeights.pack_moe([lora.loras[name] for name in order], EXPERTS)
    for expert in range(COUNT):
        w1, w2, w3 = (
            delta(b[expert], a[expert], scaling)
            for b, a, scaling in zip(packed.lora_b, packed.lora_a, packed.scaling, strict=True)
        )
        assert_same(w2, modules[f"{EXPERTS}.{expert}.down_proj"])
        if shapes is SHAPES:
            assert_same(w1, modules[f"{EXPERTS}.{expert}.gate_proj"])
            assert_same(w3, modules[f"{EXPERTS}.{expert}.up_proj"])
        else:
            assert_same(torch.cat([w1, w3]), modules[f"{EXPERTS}.{expert}.gate_up_proj"])


def test_fused_experts(tmp_path):
    modules = experts(FUSED)
    lora = loaded(tmp_path / "x", modules, ["experts"])
    manager = SimpleNamespace(
        _is_3d_moe_model=True, _get_lora_layer_weights=lambda one, name: one.loras.get(name)
    )
    layer = SimpleNamespace(
        w13_lora_a_stacked=[torch.zeros(1, COUNT, 4, 64)], global_num_experts=COUNT, ep_rank=0
    )
    scalings = [lora.loras[name].scaling for name in (f"{EXPERTS}.base_layer", EXPERTS)]
    LoRAModelManager._stack_moe_lora_weights(manager, lora, layer, EXPERTS)
    stacked = lora.loras[EXPERTS]
    for expert in range(COUNT):
        for number, part in enumerate(("gate_up_proj", "down_proj")):
            b, a = stacked.lora_b[number][expert], stacked.lora_a[number][expert]
            assert_same(delta(b, a, scalings[number]), modules[f"{EXPERTS}.{expert}.{part}"])


def test_vllm_alone_refuses_an_adapter_in_int4(tmp_path):
    with pytest.raises(ValueError, match=r"lora_[AB].weight_\w+ is unsupported LoRA weight"):
        loaded(tmp_path / "int4", {"model.layers.0.q_proj": pair(8, 16)}, {"q_proj"}, bits=4)


def test_an_adapter_in_int4_is_served_dequantised(tiny_models, tiny_adapters, prompts, tmp_path):
    """Its answers are those of the folder that ``adapter dequantize`` writes, bit for bit."""
    given = tiny_adapters["b"]
    quantize_adapter(given, tmp_path / "int4")
    dequantize_adapter(tmp_path / "int4", tmp_path / "floats")
    assert read_adapter(tmp_path / "int4").notes[0].startswith("stored in INT4")
    folders = {"given": given, "int4": tmp_path / "int4", "floats": tmp_path / "floats"}
    answers = {}
    with engine(
        tiny_models["g128"], enable_lora=True, max_loras=3, max_lora_rank=16, **COLD
    ) as llm:
        for name, request in requests_of(folders).items():
            answers[name] = next_logprobs(llm, prompts[:1], [request])
        base = next_logprobs(llm, prompts[:1], [None])
    assert answers["int4"] == answers["floats"]
    assert answers["int4"] != answers["given"]
    assert answers["int4"] != base
