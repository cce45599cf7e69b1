"""Experts and embeddings are written in forms that PEFT loads, and read back the same."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from int4_lora.integration import AdapterModule, read_adapter, write_adapter
from support.adapters import assert_equal
from support.trained import WITH_TODAYS_PEFT, llama, qwen3_moe, trained

pytestmark = WITH_TODAYS_PEFT

SHAPES = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}


def pairs(rank=4, scaling=2.0, parts=SHAPES, seed=0):
    """Return a pair for each projection of the three experts of the two layers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}": AdapterModule(
            torch.randn(rank, SHAPES[part][1], generator=generator),
            torch.randn(SHAPES[part][0], rank, generator=generator),
            scaling,
        )
        for layer in (0, 1)
        for expert in range(3)
        for part in parts
    }


def merged(folder, model):
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()


def expected(modules):
    """Return the weights of Qwen3-MoE with pairs added, as transformers holds them."""
    weights = {name: weight.clone() for name, weight in qwen3_moe().state_dict().items()}
    for name, module in modules.items():
        delta = module.scaling * (module.b @ module.a)
        owner, _, part = name.rpartition(".")
        if ".experts." not in name:
            weights[f"{name}.weight"] += delta
            continue
        owner, _, expert = owner.rpartition(".")
        if part == "down_proj":
            weights[f"{owner}.down_proj"][int(expert)] += delta
            continue
        rows = {"gate_proj": slice(0, 32), "up_proj": slice(32, 64), "gate_up_proj": slice(0, 64)}
        weights[f"{owner}.gate_up_proj"][int(expert), rows[part]] += delta
    return weights


def assert_loaded(folder, modules):
    found = merged(folder, qwen3_moe())
    for name, weight in expected(modules).items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=name)


ATTENTION = {"model.layers.1.self_attn.q_proj": AdapterModule(
    torch.full((7, 64), 0.1), torch.full((64, 7), 0.1), 0.5
)}  # fmt: skip


@pytest.mark.parametrize("others", [{}, ATTENTION], ids=["experts", "and-attention"])
@pytest.mark.parametrize("parts", [SHAPES, ["down_proj"]], ids=["all", "down"])
def test_peft_loads_a_pair_for_each_expert(tmp_path, parts, others):
    modules = pairs(parts=parts) | others
    adapter = write_adapter(tmp_path / "out", modules)
    assert_equal(adapter.modules, modules)
    assert "base_model.model.model.layers.0.mlp.experts.2.down_proj.lora_A.weight" in load_file(
        tmp_path / "out/adapter_model.safetensors"
    )  # the names that vLLM reads
    assert_loaded(tmp_path / "out", modules)


@pytest.mark.parametrize("parts", [SHAPES, ["down_proj"]], ids=["all", "down"])
def test_peft_loads_one_pair_for_all_experts(tmp_path, parts):
    modules = pairs(parts=parts) | ATTENTION
    adapter = write_adapter(tmp_path / "out", modules, experts="fused")
    assert_loaded(tmp_path / "out", modules)
    names = {"gate_up_proj", "down_proj"} if parts is SHAPES else {"down_proj"}
    assert {name.rpartition(".")[2] for name in adapter.modules} == names | {"q_proj"}
    again = write_adapter(tmp_path / "again", adapter.modules, experts="fused")
    assert_equal(again.modules, adapter.modules)


def test_what_peft_wrote_is_written_back_to_the_bit(tmp_path):
    settings = {"target_modules": "all-linear", "rank_pattern": {"down_proj": 3}}
    trained(qwen3_moe(), tmp_path / "theirs", steps=0, **settings)
    adapter = read_adapter(tmp_path / "theirs")
    assert_equal(write_adapter(tmp_path / "ours", adapter.modules).modules, adapter.modules)
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert_loaded(tmp_path / "ours", adapter.modules)


def test_one_pair_split_for_each_expert_and_joined_again(tmp_path):
    settings = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    trained(qwen3_moe(), tmp_path / "theirs", steps=0, target_modules=[], **settings)
    adapter = read_adapter(tmp_path / "theirs")
    separate = write_adapter(tmp_path / "separate", adapter.modules, experts="separate")
    assert {name.rpartition(".")[2] for name in separate.modules} == {*SHAPES}
    assert_loaded(tmp_path / "separate", adapter.modules)
    fused = write_adapter(tmp_path / "fused", separate.modules, experts="fused")
    assert_equal(fused.modules, adapter.modules)


def test_an_embedding_is_written_as_peft_does(tmp_path):
    trained(llama(), tmp_path / "theirs", steps=0, target_modules=["embed_tokens", "lm_head"])
    modules = read_adapter(tmp_path / "theirs").modules
    assert_equal(write_adapter(tmp_path / "ours", modules).modules, modules)
    ours, theirs = merged(tmp_path / "ours", llama()), merged(tmp_path / "theirs", llama())
    before = llama().state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(ours[name], theirs[name])
        assert not torch.equal(ours[name], before[name])


EXPERT = "model.layers.0.mlp.experts.1."


def changed(part, **fields):
    modules = pairs()
    name = EXPERT + part
    return modules | {name: dataclasses.replace(modules[name], **fields)}


def without(part):
    modules = pairs()
    del modules[EXPERT + part]
    return modules


@pytest.mark.parametrize(
    ("modules", "experts", "message"),
    [
        (without("down_proj"), "fused", r"0\.mlp\.experts: expert 1 has no pair of down_proj"),
        (without("up_proj"), "fused", r"0\.mlp\.experts: expert 1 has no pair of up_proj"),
        (pairs(parts=["gate_proj"]), "fused", "can only be fused if both have pairs"),
        (changed("down_proj", scaling=1.0), "fused", r"down_proj: all experts must have .* 1\.0"),
        (changed("up_proj", scaling=1.0), "fused", "gate_proj and up_proj must have one scaling"),
        (changed("down_proj", scaling=1.0), None, r"experts have the scalings \[1\.0, 2"),
        (pairs() | {EXPERT + "w1": pairs()[EXPERT + "up_proj"]}, "fused",
         r"'w1'\] cannot be fused"),
        (pairs() | {EXPERT + "gate_up_proj": pairs()[EXPERT + "up_proj"]}, "separate",
         "gate_up_proj of 32 rows cannot be split into gate_proj and up_proj beside"),
        (pairs() | {EXPERT + "gate_up_proj": pairs()[EXPERT + "up_proj"]}, None,
         "'gate_up_proj', 'up_proj'] cannot be fused into"),
        (pairs(), "joined", "experts must be 'separate', 'fused' or None, got 'joined'"),
    ],
)  # fmt: skip
def test_refused_and_nothing_written(tmp_path, modules, experts, message):
    with pytest.raises(ValueError, match=message):
        write_adapter(tmp_path / "out", modules, experts=experts)
    assert not list(tmp_path.iterdir())
