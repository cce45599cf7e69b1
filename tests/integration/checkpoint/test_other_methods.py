"""AWQ and GPTQ checkpoints: inspect, verify, unpack and merge read them to the bit, or refuse."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint.inspect import inspect
from support import layouts
from support.checkpoints import Q_PROJ, edit_config, edit_tensors
from support.conversion import refusal, run
from support.other_checkpoints import CONFIGS, VARIANTS, Other, make

DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_is_read_to_the_bit(tmp_path, variant):
    """``verify`` agrees, and ``unpack`` writes every dense tensor and no other."""
    model, folder = make(tmp_path / "x", variant, shards=3)
    layouts.assert_dense(model, folder, tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize("variant", ["gptq_v1", "gptq_desc_act", "gptq_8_bits", "awq"])
def test_adapters_fit_and_merge_to_the_bit(tmp_path, variant):
    model, folder = make(tmp_path / "x", variant)
    adapter, pairs = layouts.adapter(tmp_path / "lora", {Q_PROJ: (64, 64), DOWN: (64, 96)})
    layouts.assert_merged(model, pairs, folder, adapter, tmp_path / "merged")
    said = refusal("merge", folder, tmp_path / "int4", "--adapter", adapter, "--to", "int4")
    assert "merging into INT4 needs a compressed-tensors checkpoint" in said
    assert "int4-lora convert" in said


@pytest.mark.parametrize("variant", ["gptq_v1", "awq"])
def test_verify_says_that_no_other_reads_the_layout_of_gptq(tmp_path, variant):
    _, folder = make(tmp_path / "x", variant)
    result = run("verify", folder)
    assert result.exit_code == 0
    assert ("does not read its layout" in result.output) == (variant == "gptq_v1")


def test_inspect_names_the_format_but_for_pack_quantized(tmp_path, tiny_models):
    _, folder = make(tmp_path / "x", "gptq_v1")
    assert "gptq, 4 bit" in run("inspect", folder).output
    assert "pack-quantized" not in run("inspect", tiny_models["g128"]).output


def test_inspect_describes_the_modules(tmp_path):
    _, folder = make(tmp_path / "x", "gptq_desc_act")
    report = inspect(open_checkpoint(folder))
    (module,) = [module for module in report.modules if module.name == Q_PROJ]
    assert (module.format, module.bits, module.strategy) == ("gptq", 4, "group")
    assert (module.shape, module.group_size, module.g_idx) == ([64, 64], 32, True)
    assert (module.symmetric, module.scale_dtype, module.packed) == (False, "F16", True)
    assert module.nbytes == 64 * 64 // 2 + 2 * 64 // 2 + 2 * 64 * 2 + 4 * 64
    assert report.dense_tensors == 7
    assert "o_proj" in report.lora_targets
    _, folder = make(tmp_path / "y", "gptq_v1")
    assert not any(module.g_idx for module in inspect(open_checkpoint(folder)).modules)


def test_a_weight_may_be_large(tmp_path):
    """More than a block of rows: the outputs are cut in words, not in the middle of one."""
    for kind in ("gptq", "awq"):
        model = Other(kind)
        model.packed("model.up_proj", 1048, 2048)
        folder = model.save(tmp_path / kind, CONFIGS[kind])
        layouts.assert_dense(model, folder, tmp_path / f"{kind}-dense")


def test_dynamic_rules_change_single_modules(tmp_path):
    model = Other("gptq").llama()
    model.packed(Q_PROJ, 64, 64, bits=8, size=16)
    model.put("model.layers.0.mlp.up_proj.weight", torch.ones(96, 64, dtype=torch.float16))
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del model.stored[f"model.layers.0.mlp.up_proj.{part}"]
    dynamic = {
        "-:.*layers.0.mlp.up_proj": {},
        r"+:model\.layers\.0\..*q_proj": {"bits": 8, "group_size": 16},
    }
    folder = model.save(tmp_path / "x", {**CONFIGS["gptq"], "dynamic": dynamic})
    layouts.assert_dense(model, folder, tmp_path / "dense")
    edit_config(folder, lambda _, q: q["dynamic"].update({"-:.*k_proj": {}}))
    with pytest.raises(ValueError, match=r"k_proj is quantised, but dynamic excludes it"):
        open_checkpoint(folder)


BAD_CONFIGS = [
    ("gptq", {"bits": 3}, "bits must be 4 or 8 to be read, got 3"),
    ("gptq", {"bits": 2}, "bits must be 4 or 8 to be read, got 2"),
    ("gptq", {"bits": "4"}, "bits must be 4 or 8 to be read, got '4'"),
    ("gptq", {"checkpoint_format": "marlin"}, "or 'gptq_v2', got 'marlin': only the layouts"),
    ("gptq", {"checkpoint_format": "exllama"}, "or 'gptq_v2', got 'exllama': only the layouts"),
    ("gptq", {"format": "gptq_v2", "checkpoint_format": "gptq"}, "got 'gptq' and 'gptq_v2'"),
    ("gptq", {"is_marlin_format": True}, "is_marlin_format must be false"),
    ("gptq", {"pack_dtype": "int16"}, "pack_dtype must be 'int32', got 'int16'"),
    ("gptq", {"group_size": 0}, "group_size must be a positive whole number or -1, got 0"),
    ("gptq", {"group_size": 16}, "down_proj: group_size must make 3 groups of 96 columns"),
    ("gptq", {"group_size": -1}, "strategy 'group', config.json says 'channel'"),
    ("gptq", {"sym": "yes"}, "sym must be true or false, got 'yes'"),
    ("gptq", {"desc_act": 1}, "desc_act must be true or false, got 1"),
    ("gptq", {"dynamic": []}, None),
    ("gptq", {"dynamic": ["q_proj"]}, "dynamic must map patterns to objects"),
    ("gptq", {"dynamic": {"+:(": {}}}, "dynamic: '(': missing )"),
    ("awq", {"version": "gemv"}, "version must be 'gemm', got 'gemv': only the layouts"),
    ("awq", {"version": "gemv_fast"}, "version must be 'gemm', got 'gemv_fast'"),
    ("awq", {"version": "exllama"}, "version must be 'gemm', got 'exllama'"),
    ("awq", {"version": "marlin"}, "version must be 'gemm', got 'marlin'"),
    ("awq", {"backend": "llm-awq"}, "backend 'llm-awq' packs weights in another layout"),
    ("awq", {"bits": 8}, "bits must be 4, got 8"),
    ("awq", {"zero_point": False}, "zero-points must be 8 in a symmetric weight, got"),
    ("awq", {"zero_point": "no"}, "zero_point must be true or false, got 'no'"),
    ("awq", {"quant_method": "bitsandbytes"}, "got 'bitsandbytes': its codes are packed for its"),
    ("awq", {"quant_method": "auto-round"}, "'awq' or 'gptq', got 'auto-round'"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "change", "said"), BAD_CONFIGS)
def test_refuses_configs(tmp_path, method, change, said):
    _, folder = make(tmp_path / "x", {"gptq": "gptq_v1", "awq": "awq"}[method], **change)
    if said is None:
        assert run("inspect", folder).exit_code == 0
        return
    assert said in " ".join(refusal("unpack", folder, tmp_path / "dense").split())


def test_older_names_of_awqs_fields_are_read(tmp_path):
    _, folder = make(tmp_path / "x", "awq")
    edit_config(
        folder, lambda _, q: q.update(w_bit=q.pop("bits"), q_group_size=q.pop("group_size"))
    )
    assert run("inspect", folder).exit_code == 0


BAD_TENSORS = [
    ("gptq_v1", {"qweight": None}, "qweight of a gptq module is missing"),
    ("gptq_v1", {"qzeros": None}, "qzeros of a gptq module is missing"),
    ("gptq_v1", {"scales": None}, "scales of a gptq module is missing"),
    ("gptq_desc_act", {"g_idx": None}, "g_idx of a gptq module is missing"),
    ("gptq_v1", {"qweight": lambda t: t.to(torch.int64)}, "qweight must be int32, got int64"),
    ("gptq_v1", {"qweight": lambda t: t[:, :32]}, "= [*, 64], got [8, 32]"),
    ("gptq_v1", {"qweight": lambda t: t[:7]}, "g_idx must be [in_features] = [56], got [64]"),
    ("gptq_v1", {"qweight": lambda t: t.flatten()}, "qweight must be"),
    ("gptq_v1", {"qzeros": lambda t: t.half()}, "qzeros must be int32, got float16"),
    ("gptq_v1", {"qzeros": lambda t: t[:1]}, "= [2, 8], got [1, 8]"),
    ("gptq_v1", {"scales": lambda t: t.to(torch.int32)}, "scales must be float16, bfloat16"),
    ("gptq_v1", {"scales": lambda t: t[:1]}, "qzeros must be"),
    ("gptq_v1", {"g_idx": lambda t: t.long()}, "g_idx must be int32, got int64"),
    ("gptq_v1", {"g_idx": lambda t: t[:32]}, "g_idx must be [in_features] = [64], got [32]"),
    ("gptq_v1", {"g_idx": lambda t: t + 1}, "g_idx must be in [0, 2), the groups of scales"),
    ("gptq_v1", {"g_idx": lambda t: t * 0}, "g_idx must name more than the first of 2 groups"),
    ("gptq_v1", {"g_idx": lambda t: t.flip(0)}, "where config.json says desc_act false"),
    ("gptq_v1", {"qzeros": lambda t: t + 1}, "zero-points must be 8 in a symmetric weight, got 9"),
    ("gptq_v1_asym", {"qzeros": lambda t: t | 15}, "means the zero-point 16, which 4 bits do not"),
    ("gptq_v1", {"weight": lambda t: torch.ones(64, 64).half()}, "weight is stored beside qweight"),
    (
        "gptq_v1",
        {"weight_g_idx": lambda t: torch.zeros(64).int()},
        "weight_g_idx is stored beside qweight",
    ),
    ("awq", {"weight_scale": lambda t: torch.ones(64, 2)}, "weight_scale is stored beside qweight"),
    (
        "gptq_v1",
        {"weight_shape": lambda t: torch.tensor([1, 2])},
        "weight_shape is stored beside qweight",
    ),
    ("awq", {"qweight": None}, "qweight of an awq module is missing"),
    ("awq", {"qweight": None, "qzeros": None}, "AutoAWQ divides an activation by them"),
    ("awq", {"g_idx": lambda t: torch.zeros(64, dtype=torch.int32)}, "g_idx is stored beside"),
    ("awq", {"qweight": lambda t: t.to(torch.int16)}, "qweight must be int32, got int16"),
    ("awq", {"qweight": lambda t: t.T}, "scales must be"),
    ("awq", {"scales": lambda t: t.double()}, "scales must be float16, bfloat16 or float32"),
    ("awq", {"qzeros": lambda t: t.repeat(1, 8)}, "= [2, 8], got [2, 64]"),
    ("awq", {"qzeros": None}, "qzeros of an awq module is missing"),
    ("awq", {"qzeros": lambda t: t.half()}, "qzeros must be int32, got float16"),
    ("awq", {"scales": None}, "scales of an awq module is missing"),
    ("awq", {"scales": lambda t: t[:1]}, "= [1, 8], got [2, 8]"),
    ("awq", {"qweight": lambda t: t[:63]}, "2 groups, which do not divide in_features = 63"),
    ("awq", {"qweight": lambda t: t.flatten()}, "qweight must be"),
    ("awq_sym", {"qzeros": lambda t: t + 1}, "zero-points must be 8 in a symmetric weight, got 9"),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "changes", "said"), BAD_TENSORS)
@pytest.mark.parametrize("command", ["unpack", "convert"])
def test_refuses_tensors_before_anything_is_written(tmp_path, command, variant, changes, said):
    _, folder = make(tmp_path / "x", variant)
    edit_tensors(folder, **changes)
    message = " ".join(refusal(command, folder, tmp_path / "result").split())
    assert said in message
    assert Q_PROJ in message


def test_codes_under_another_name_are_not_copied_as_weights(tmp_path):
    _, folder = make(tmp_path / "x", "awq")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q_PROJ}.codes"] = tensors.pop(f"{Q_PROJ}.qweight")
    save_file(tensors, folder / "model.safetensors")
    assert "qweight of an awq module is missing" in refusal("unpack", folder, tmp_path / "dense")


@pytest.mark.parametrize("variant", ["gptq_v1", "awq"])
def test_commands_that_write_into_int4_name_convert(tmp_path, variant):
    _, folder = make(tmp_path / "x", variant)
    before = (folder / "config.json").read_bytes()
    result = run("annotate", folder)
    assert result.exit_code == 2
    assert "int4-lora convert writes one" in " ".join(result.stderr.split())
    assert (folder / "config.json").read_bytes() == before
