"""int4-lora unpack: bit for bit what upstream decompresses, and what transformers then computes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint.compressed_tensors import decompress
from int4_lora.integration.checkpoint.verify import same_bits
from int4_lora.integration.conversion import unpack_checkpoint
from int4_lora.integration.conversion.convert import Settings
from int4_lora.reference import dequantize
from support.checkpoints import Q_PROJ, edit_config, edit_tensors, shard, weights
from support.conversion import bytes_of, convert, refusal, run, tensors_of
from support.tiny import LLAMA, VARIANTS
from support.upstream_versions import REFUSES_ZERO_POINTS

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_what_upstream_decompresses(tiny_models, tmp_path, variant):
    source = tiny_models[variant]
    before = bytes_of(source)
    convert("unpack", source, tmp_path / "dense")
    found, checkpoint = tensors_of(tmp_path / "dense"), open_checkpoint(source)
    for name in checkpoint.modules():
        dense = found.pop(f"{name}.weight")
        assert same_bits(dense, dequantize(checkpoint.packed_weight(name)))
        if variant != "actorder-g128":  # which some versions of upstream get wrong: see verify
            assert same_bits(dense, decompress(checkpoint, name))
    stored = tensors_of(source)
    others = {name for name in stored if not name.removesuffix(".weight").endswith("_proj")}
    others = {name for name in others if ".weight_" not in name}
    assert set(found) == others
    assert all(same_bits(found[name], stored[name]) for name in others)
    assert bytes_of(source) == before


LOADED = ["g128", "channel", "actorder-weight-g128", *([] if REFUSES_ZERO_POINTS else ["asym-g32"])]


@pytest.mark.parametrize("variant", LOADED)
def test_transformers_computes_the_same_logits(tiny_models, tmp_path, variant):
    from transformers import AutoModelForCausalLM

    convert("unpack", tiny_models[variant], tmp_path / "dense")
    tokens = torch.arange(24).view(2, 12)
    found = []
    for folder in (tiny_models[variant], tmp_path / "dense"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        with torch.no_grad():
            found.append(model(tokens).logits)
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert "quantization_config" not in config
    assert torch.equal(*found)


def test_shards_and_other_files(tiny_models, tmp_path):
    source = shutil.copytree(tiny_models["asym-g32"], tmp_path / "source")
    shard(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "templates").mkdir()
    (source / "templates/a.jinja").write_text("a")
    (source / ".cache").mkdir()
    (source / ".cache/b").write_text("b")
    (source / "pytorch_model.bin").write_text("c")
    outcome = convert("unpack", source, tmp_path / "dense", "--max-shard-size", 0.001)
    assert outcome["carried"] == ["generation_config.json", "templates/a.jinja", "tokenizer.json"]
    dense = tmp_path / "dense"
    index = json.loads((dense / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(outcome["files"]) > 2
    found = tensors_of(dense)
    assert set(found) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in found.values())
    whole = unpack_checkpoint(tiny_models["asym-g32"], tmp_path / "whole")
    assert list(whole.files) == ["model.safetensors"]
    expected = tensors_of(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    names = {file.name for file in dense.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors.index.json",
                     "templates", "tokenizer.json", *outcome["files"]}  # fmt: skip


def test_a_dtype_is_that_of_every_floating_tensor(tiny_models, tmp_path):
    for name, dtype in (("float16", torch.float16), ("float32", torch.float32)):
        convert("unpack", tiny_models["g32"], tmp_path / name, "--dtype", name)
        found = tensors_of(tmp_path / name)
        assert {one.dtype for one in found.values()} == {dtype}
        checkpoint = open_checkpoint(tiny_models["g32"])
        expected = dequantize(checkpoint.packed_weight(Q_PROJ), dtype)
        assert torch.equal(found[f"{Q_PROJ}.weight"], expected)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert name in (config.get("dtype"), config.get("torch_dtype"))


def test_what_cannot_be_used_is_said_before_anything_is_written(copied_model, tmp_path):
    target = tmp_path / "dense"
    assert "--dtype" in refusal("unpack", copied_model, target, "--dtype", "int8")
    assert "--jobs must be" in refusal("unpack", copied_model, target, "--jobs", 0)
    assert "I/N" in refusal("unpack", copied_model, target, "--shard", "3/2")
    assert "I/N" in refusal("unpack", copied_model, target, "--shard", "0/2")
    assert "--max-shard-size" in refusal("unpack", copied_model, target, "--max-shard-size", 0)
    assert "apart from" in refusal("unpack", copied_model, copied_model / "dense")
    assert str(tmp_path / "none") in refusal("unpack", tmp_path / "none", target)
    index = shard(copied_model)
    (copied_model / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003" in refusal("unpack", copied_model, target)
    index.unlink()
    assert "neither" in refusal("unpack", copied_model, target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": lambda scale: scale[:-1]}, "scale"),
        ({"weight_packed": lambda packed: packed[:, :-1]}, "packed"),
        ({"weight_zero_point": None}, "weight_zero_point"),
        ({"weight_shape": lambda shape: shape + 1}, "packed"),
        ({"weight_scale": lambda scale: scale.to(torch.int32)}, "scale"),
    ],
)
def test_tensors_that_contradict_each_other(copied_model, tmp_path, changes, message):
    edit_tensors(copied_model, **changes)
    said = refusal("unpack", copied_model, tmp_path / "dense")
    assert Q_PROJ in said
    assert message in said


def test_a_format_that_nobody_can_unpack_is_named(copied_model, tmp_path):
    edit_config(copied_model, lambda _, q: q["config_groups"]["group_0"].update(format="marlin-24"))
    assert "marlin-24 of int, 4 bits, cannot be unpacked" in refusal(
        "unpack", copied_model, tmp_path / "dense"
    )
    edit_config(copied_model, weights(num_bits=3))
    refusal("unpack", copied_model, tmp_path / "dense")


def test_a_value_that_a_dtype_cannot_hold(tiny_models, tmp_path):
    source = shutil.copytree(tiny_models["g32"], tmp_path / "source")
    edit_tensors(source, weight_scale=lambda scale: torch.full_like(scale, 60000))
    result = run("unpack", source, tmp_path / "dense", "--dtype", "float16")
    assert result.exit_code == 2
    assert Q_PROJ in result.stderr
    assert "finite in float16" in result.stderr
    assert not (tmp_path / "dense").exists()
    convert("unpack", source, tmp_path / "dense", "--dtype", "bfloat16", "--force")


def test_other_formats_go_through_compressed_tensors(tmp_path):
    source, dense = tmp_path / "source", tmp_path / "dense"
    source.mkdir()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-32, 32, (16, 32), generator=generator).to(torch.int8)
    scale = torch.rand(16, 1, generator=generator).bfloat16()
    save_file({"a.weight": codes, "a.weight_scale": scale}, source / "model.safetensors")
    group = {"targets": ["a"], "weights": {"num_bits": 6, "type": "int", "symmetric": True,
             "strategy": "channel"}, "input_activations": None}  # fmt: skip
    quantization = {"quant_method": "compressed-tensors", "format": "int-quantized",
                    "config_groups": {"group_0": group}}  # fmt: skip
    (source / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    convert("unpack", source, dense)
    assert torch.equal(tensors_of(dense)["a.weight"], (codes.to(torch.bfloat16) * scale))


def test_jobs_change_no_byte(tiny_models, tmp_path):
    found = []
    for jobs in (1, 3):
        target = tmp_path / str(jobs)
        unpack_checkpoint(tiny_models["asym-g128"], target, settings=Settings(jobs=jobs))
        found.append(bytes_of(target))
    assert found[0] == found[1]


def test_peft_merges_dora_into_what_is_unpacked(tiny_models, tmp_path):
    """The way that docs/vllm.md names for adapters that vLLM and ``int4-lora merge`` refuse."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from int4_lora.integration.demo import recipe

    settings = {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": "all-linear"}
    recipe.make_adapter(tmp_path / "dora", LLAMA, "dora", settings)
    convert("unpack", tiny_models["g128"], tmp_path / "dense")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    tokens = torch.arange(1, 21).view(2, 10) * 7 % 512
    with torch.no_grad():
        plain = base(tokens).logits
        model = PeftModel.from_pretrained(base, tmp_path / "dora").eval()
        right = model(tokens).logits
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        off = (merged(tokens).logits - right).abs().max()
    assert off <= 1e-3 * (right - plain).abs().max()
