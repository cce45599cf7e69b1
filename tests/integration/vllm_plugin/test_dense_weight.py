"""Weights read again from the checkpoint, merged and split over ranks as vLLM's layers are."""

from types import SimpleNamespace

import pytest
import torch

from int4_lora.integration.checkpoint.open import open_checkpoint
from int4_lora.integration.vllm_plugin.dense_weight import packed_weight_of_checkpoint
from int4_lora.integration.vllm_plugin.served_engine import ServedEngine
from int4_lora.integration.vllm_plugin.served_layer import ServedLayer
from int4_lora.reference import dequantize
from support.bases import write_base

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def read(model, name, sizes, columns, rank, packed=MERGED, **attributes):
    engine = ServedEngine(model=str(model), packed_modules=packed)
    layer = SimpleNamespace(
        int4_lora=ServedLayer(name, engine),
        output_partition_sizes=sizes,
        input_size_per_partition=columns,
        tp_rank=rank,
        **attributes,
    )
    return dequantize(packed_weight_of_checkpoint(layer))


def dense(model, module):
    return dequantize(open_checkpoint(model).packed_weight(module))


@pytest.mark.parametrize("variant", ["g32", "asym-g32", "channel", "asym-channel"])
@pytest.mark.parametrize("rank", [0, 1])
def test_rows_are_split_over_two_ranks(variant, rank, tiny_models):
    model = tiny_models[variant]
    weight = read(model, f"{ATTENTION}.qkv_proj", [128, 64, 64], 256, rank)
    parts = [dense(model, f"{ATTENTION}.{part}_proj").chunk(2)[rank] for part in ("q", "k", "v")]
    assert torch.equal(weight, torch.cat(parts))
    weight = read(model, f"{MLP}.gate_up_proj", [256, 256], 256, rank)
    parts = [dense(model, f"{MLP}.{part}_proj").chunk(2)[rank] for part in ("gate", "up")]
    assert torch.equal(weight, torch.cat(parts))


@pytest.mark.parametrize("variant", ["g32", "asym-g32", "channel", "asym-channel"])
@pytest.mark.parametrize("rank", [0, 1])
def test_columns_are_split_over_two_ranks(variant, rank, tiny_models):
    model = tiny_models[variant]
    weight = read(model, f"{MLP}.down_proj", [256], 256, rank)
    assert torch.equal(weight, dense(model, f"{MLP}.down_proj").chunk(2, dim=1)[rank])


def test_key_heads_that_are_fewer_than_ranks_are_on_several(tiny_models):
    """Four ranks, two key heads: ranks 2 and 3 have the second."""
    model = tiny_models["asym-g32"]
    query, key, value = (dense(model, f"{ATTENTION}.{part}_proj") for part in ("q", "k", "v"))
    for rank in range(4):
        attributes = {"num_kv_head_replicas": 2}
        weight = read(model, f"{ATTENTION}.qkv_proj", [64, 64, 64], 256, rank, **attributes)
        right = [query.chunk(4)[rank], key.chunk(2)[rank // 2], value.chunk(2)[rank // 2]]
        assert torch.equal(weight, torch.cat(right))


@pytest.mark.parametrize("packed_modules", [{}, {"qkv_proj": ["qkv_proj"]}, MERGED])
def test_weights_that_the_file_has_merged(packed_modules, tmp_path):
    """Phi-3 stores qkv_proj; vLLM's name of the layer is that of another transformers' layout."""
    module = "model.language_model.layers.0.self_attn.qkv_proj"
    dense = write_base(tmp_path / "base", {module: (64, 32)})[module].to(torch.bfloat16)
    name = "language_model.model.layers.0.self_attn.qkv_proj"
    for rank in range(4):
        attributes = {"tp_size": 4, "num_kv_head_replicas": 2, "packed": packed_modules}
        weight = read(tmp_path / "base", name, [8, 8, 8], 32, rank, **attributes)
        query, key, value = dense.split([32, 16, 16])
        right = [query.chunk(4)[rank], key.chunk(2)[rank // 2], value.chunk(2)[rank // 2]]
        assert torch.equal(weight, torch.cat(right))
    with pytest.raises(ValueError, match=f"{module} has 64 rows, and the layer {name} 60"):
        read(tmp_path / "base", name, [40, 10, 10], 32, 0, tp_size=1, packed=packed_modules)


def test_a_module_that_is_not_there_is_named(tiny_models):
    with pytest.raises(ValueError, match=r"has no module model\.layers\.9\.mlp\.down_proj"):
        read(tiny_models["g32"], "model.layers.9.mlp.down_proj", [256], 512, 0)


@pytest.mark.parametrize(("size", "rank"), [(258, 0), (200, 1)])
def test_a_module_with_fewer_rows_than_the_layer_is_refused(size, rank, tiny_models):
    with pytest.raises(ValueError, match=r"index must be in \[0, 256\), the rows of weight"):
        read(tiny_models["g32"], f"{MLP}.down_proj", [size], 512, rank)
