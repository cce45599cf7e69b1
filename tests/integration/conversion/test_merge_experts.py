"""A Qwen3-MoE in INT4, and adapters that PEFT trained on its experts: merged to PEFT's logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.conversion import convert, refusal, run, tensors_of
from support.layouts import Model, quantization
from support.trained import QWEN3_MOE, WITH_TODAYS_PEFT, trained

pytestmark = WITH_TODAYS_PEFT

TOKENS = torch.arange(24).view(2, 12)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SETTINGS = {
    "parameters": {"target_parameters": EXPERTS, "target_modules": ["q_proj"]},
    "down": {"target_parameters": EXPERTS[1:], "target_modules": []},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return an INT4 Qwen3-MoE, and the dense model that it encodes."""
    from transformers import Qwen3MoeConfig

    root, model = tmp_path_factory.mktemp("qwen3-moe"), Model()
    for name in ("model.embed_tokens", "lm_head"):
        model.plain(f"{name}.weight", 80, 64)
    for layer in ("model.layers.0.", "model.layers.1."):
        for name, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("o_proj", 64)):
            model.packed(f"{layer}self_attn.{name}", rows, 64)
        model.plain(f"{layer}mlp.gate.weight", 3, 64)
        for expert in range(3):
            for name, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32))):
                model.packed(f"{layer}mlp.experts.{expert}.{name}_proj", *shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            model.put(f"{layer}{name}.weight", torch.ones(64, dtype=torch.bfloat16))
        for name in ("q_norm", "k_norm"):
            model.put(f"{layer}self_attn.{name}.weight", torch.ones(16, dtype=torch.bfloat16))
    model.put("model.norm.weight", torch.ones(64, dtype=torch.bfloat16))
    config = Qwen3MoeConfig(**QWEN3_MOE).to_dict()
    config["architectures"] = ["Qwen3MoeForCausalLM"]
    ignored = ["lm_head", "re:.*mlp.gate$"]
    source = model.save(root / "int4", quantization(ignore=ignored), config)
    convert("unpack", source, root / "dense", "--dtype", "float32")
    return source, root / "dense"


def load(folder):
    from transformers import AutoModelForCausalLM

    how = {"dtype": torch.float32, "experts_implementation": "eager"}  # grouped: no float64
    return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def with_adapter(folder, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(load(folder), adapter)


@torch.no_grad()
def logits(model, dtype=torch.float32):
    return model.to(dtype)(TOKENS).logits.double()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_dense_gives_the_logits_of_base_and_adapter(base, tmp_path, settings):
    source, dense = base
    trained(load(dense), tmp_path / "adapter", **settings)
    adapter = f"--adapter={tmp_path / 'adapter'}"
    outcome = convert("merge", source, tmp_path / "merged", adapter, "--dtype", "float32")
    truth = logits(with_adapter(dense, tmp_path / "adapter"), torch.float64)
    theirs = (logits(with_adapter(dense, tmp_path / "adapter")) - truth).abs().max()
    ours = (logits(load(tmp_path / "merged")) - truth).abs().max()
    assert ours <= 2 * theirs + 1e-6
    assert (logits(load(dense)) - truth).abs().max() > 1e-2  # the adapter shows
    if settings != SETTINGS["down"]:
        assert any("gate_up_proj" in note for note in outcome["notes"])


def test_mixtral_has_other_names_in_memory(tmp_path):
    from transformers import MixtralConfig

    model = Model()
    for name in ("model.embed_tokens", "lm_head"):
        model.plain(f"{name}.weight", 80, 64)
    layer = "model.layers.0."
    for name, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("o_proj", 64)):
        model.packed(f"{layer}self_attn.{name}", rows, 64)
    model.plain(f"{layer}block_sparse_moe.gate.weight", 3, 64)
    for expert in range(3):
        for name, shape in (("w1", (32, 64)), ("w3", (32, 64)), ("w2", (64, 32))):
            model.packed(f"{layer}block_sparse_moe.experts.{expert}.{name}", *shape)
    for name in (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm"):
        model.put(f"{name}.weight", torch.ones(64, dtype=torch.bfloat16))
    fields = {**QWEN3_MOE, "intermediate_size": 32, "num_local_experts": 3, "num_hidden_layers": 1}
    config = MixtralConfig(**fields).to_dict() | {"architectures": ["MixtralForCausalLM"]}
    ignored = ["lm_head", "re:.*block_sparse_moe.gate$"]
    source = model.save(tmp_path / "int4", quantization(ignore=ignored), config)
    dense, adapter = tmp_path / "dense", tmp_path / "adapter"
    convert("unpack", source, dense, "--dtype", "float32")
    trained(load(dense), adapter, target_modules=["w1", "w2", "w3", "gate", "q_proj"])
    outcome = convert(
        "merge", source, tmp_path / "merged", f"--adapter={adapter}", "--dtype", "float32"
    )
    truth = logits(with_adapter(dense, adapter), torch.float64)
    theirs = (logits(with_adapter(dense, adapter)) - truth).abs().max()
    ours = (logits(load(tmp_path / "merged")) - truth).abs().max()
    assert ours <= 2 * theirs + 1e-6
    assert (logits(load(dense)) - truth).abs().max() > 1e-2  # the adapter shows
    assert "gate_up_proj for w1 and w3, down_proj for w2 (x7)" in outcome["notes"][0]


def test_int4_is_off_from_pefts_merged_weights_by_what_it_reports(base, tmp_path):
    from int4_lora.integration import open_checkpoint
    from int4_lora.reference import dequantize

    source, dense = base
    settings = {"target_modules": "all-linear", "steps": 0}
    model = trained(load(dense).double(), tmp_path / "adapter", **settings)
    exact = model.merge_and_unload().state_dict()
    convert("merge", source, tmp_path / "merged", f"--adapter={tmp_path / 'adapter'}", "--to=int4",
            "--max-error=0.5")  # fmt: skip
    merged = open_checkpoint(tmp_path / "merged")
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    errors = {one["module"]: one["relative_error"] for one in report["modules"]}
    assert len(errors) == 2 * (4 + 3 * 3)
    for name, error in errors.items():
        expected = part_of(exact, name)
        off = dequantize(merged.packed_weight(name), torch.float64) - expected
        assert error == pytest.approx(float(off.norm() / expected.norm()), rel=1e-4), name
    router = "model.layers.1.mlp.gate.weight"
    torch.testing.assert_close(tensors_of(tmp_path / "merged")[router].double(), exact[router],
                               rtol=2**-8, atol=0)  # fmt: skip


def part_of(exact, name):
    """Return the weight of a module, which transformers may hold with those of other experts."""
    owner, _, last = name.rpartition(".")
    if ".experts." not in name:
        return exact[f"{name}.weight"]
    experts, _, number = owner.rpartition(".")
    if last == "down_proj":
        return exact[f"{experts}.down_proj"][int(number)]
    return exact[f"{experts}.gate_up_proj"][int(number)].chunk(2)[last == "up_proj"]


def test_a_rank_that_leaves_experts_out_is_refused(base, tmp_path):
    source, dense = base
    trained(load(dense), tmp_path / "adapter", **SETTINGS["down"], r=2, steps=0)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 3}))
    adapter = f"--adapter={tmp_path / 'adapter'}"
    said = refusal("merge", source, tmp_path / "merged", adapter)
    rule = "has pairs for 2 experts by its shapes and its config's rank, "
    assert f"model.layers.0.mlp.experts: the adapter {rule}" in said
    assert rule in run("inspect", source, adapter).output.replace("\n", " ")


def test_pairs_for_more_experts_than_the_base_has_are_refused(base, tmp_path):
    source, dense = base
    trained(load(dense), tmp_path / "adapter", **SETTINGS["down"], steps=0)
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        dim = 0 if "lora_A" in name else 1
        tensors[name] = torch.cat([tensor, tensor], dim)
    save_file(tensors, file)
    said = refusal("merge", source, tmp_path / "merged", f"--adapter={tmp_path / 'adapter'}")
    assert "mlp.experts.3.down_proj is no module of" in said
