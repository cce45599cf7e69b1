"""Whole tensors and rows that an adapter replaces, where a tensor is large, or a single number."""

import json

import pytest
import torch

from int4_lora.integration.conversion import dense_modules, saved_copies
from support import layouts
from support.conversion import convert, refusal, run, tensors_of

EMBED = "model.embed_tokens"
PREFIX = "base_model.model."


def write_base(folder, *, embeddings=(EMBED,), **config):
    model = layouts.Model()
    for name in embeddings:
        model.plain(f"{name}.weight", 48, 64)
    model.packed("model.layers.0.self_attn.q_proj", 64, 64)
    model.plain("lm_head.weight", 48, 64)
    model.plain("model.scale.weight")
    if config.get("tie_word_embeddings"):
        del model.stored["lm_head.weight"], model.dense["lm_head.weight"]
    model.save(folder, layouts.quantization(), {**layouts.LLAMA, **config})
    return model.dense


def write_adapter(folder, tensors, **fields):
    keyed = {PREFIX + name: tensor for name, tensor in tensors.items()}
    return layouts.write_adapter(folder, keyed, layouts.lora_config(["q_proj"], **fields))


@pytest.fixture
def blocks_of_a_row(monkeypatch):
    for module in (dense_modules, saved_copies):
        monkeypatch.setattr(module, "ROWS_BYTES", 1)


def merged(base, adapter, target):
    return convert("merge", base, target, "--adapter", adapter), tensors_of(target)


@pytest.mark.usefixtures("blocks_of_a_row")
def test_rows_and_whole_weights_of_many_blocks(tmp_path):
    dense = write_base(tmp_path / "base")
    rows, head = torch.arange(128.0).view(2, 64), dense["lm_head.weight"] + 1
    tensors = {f"{EMBED}.token_adapter.trainable_tokens_delta": rows, "lm_head.weight": head}
    adapter = write_adapter(tmp_path / "adapter", tensors, trainable_token_indices=[40, 3])
    result, found = merged(tmp_path / "base", adapter, tmp_path / "merged")
    assert sorted(result["notes"]) == [
        f"{adapter}: lm_head.weight is replaced",
        f"{adapter}: rows of {EMBED}.weight are replaced: 2",
    ]
    embeddings = dense[f"{EMBED}.weight"].clone()
    embeddings[[40, 3]] = rows.to(torch.bfloat16)
    assert torch.equal(found[f"{EMBED}.weight"], embeddings)
    assert torch.equal(found["lm_head.weight"], head)


def test_rows_and_whole_weights_are_named_by_inspect_and_in_the_report(tmp_path):
    dense = write_base(tmp_path / "base")
    rows, head = torch.arange(128.0).view(2, 64), dense["lm_head.weight"] + 1
    tokens = f"{EMBED}.token_adapter.trainable_tokens_delta"
    both = {tokens: rows, "lm_head.weight": head}
    adapter = write_adapter(tmp_path / "adapter", both, trainable_token_indices=[40, 3])
    convert("merge", tmp_path / "base", tmp_path / "merged", "--adapter", adapter, "--to=int4")
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert report["adapters"] == [
        {
            "name": "adapter",
            "weight": 1.0,
            "replaced": [
                {"tensor": "lm_head.weight", "rows": None},
                {"tensor": f"{EMBED}.weight", "rows": [40, 3]},
            ],
        }
    ]
    (inspected,) = json.loads(
        run("inspect", tmp_path / "base", "--adapter", adapter, "--json").stdout
    )["adapters"]
    assert inspected["replaced"] == {"lm_head.weight": None, f"{EMBED}.weight": 2}
    alone = write_adapter(tmp_path / "alone", {tokens: rows}, trainable_token_indices=[40, 3])
    shown = " ".join(run("inspect", tmp_path / "base", "--adapter", alone).output.split())
    assert "alone: no pairs" in shown
    assert f"replaces 2 rows of {EMBED}.weight" in shown
    assert f"rows of {EMBED}.weight are replaced: 2, which only merge applies" in shown
    assert "is replaced" not in shown


@pytest.mark.usefixtures("blocks_of_a_row")
@pytest.mark.parametrize("row", [0, 20, 47])
def test_a_copy_that_differs_in_one_bit_of_one_row_replaces(tmp_path, row):
    dense = write_base(tmp_path / "base")
    head = dense["lm_head.weight"].clone()
    head.view(torch.int16)[row, 5] ^= 1
    adapter = write_adapter(tmp_path / "adapter", {"lm_head.weight": head})
    result, found = merged(tmp_path / "base", adapter, tmp_path / "merged")
    assert result["notes"] == [f"{adapter}: lm_head.weight is replaced"]
    assert torch.equal(found["lm_head.weight"], head)


def test_a_single_number_is_replaced(tmp_path):
    write_base(tmp_path / "base")
    tensors = {"model.scale.weight": torch.tensor(2.5)}
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["scale"])
    _, found = merged(tmp_path / "base", adapter, tmp_path / "merged")
    assert torch.equal(found["model.scale.weight"], torch.tensor(2.5, dtype=torch.bfloat16))


def test_embeddings_whose_tied_head_has_no_certain_name_are_not_changed_alone(tmp_path):
    write_base(
        tmp_path / "base", embeddings=(EMBED, "audio.embed_tokens"), tie_word_embeddings=True
    )
    values = torch.ones(48, 64)
    adapter = write_adapter(
        tmp_path / "adapter", {f"{EMBED}.weight": values}, modules_to_save=["embed_tokens"]
    )
    message = refusal("merge", tmp_path / "base", tmp_path / "merged", "--adapter", adapter)
    assert f"{EMBED}: an adapter changes it alone, and a head may be tied to it" in message
    assert not (tmp_path / "merged").exists()


def test_embeddings_whose_head_lies_elsewhere_get_no_other_head(tmp_path):
    model = layouts.Model()
    model.plain("thinker.model.embed_tokens.weight", 48, 64)
    model.packed("thinker.model.layers.0.self_attn.q_proj", 64, 64)
    model.plain("thinker.lm_head.weight", 48, 64)
    model.save(tmp_path / "base", layouts.quantization(), {"model_type": "made_up"})
    values = torch.ones(48, 64)
    adapter = write_adapter(
        tmp_path / "adapter",
        {"thinker.model.embed_tokens.weight": values},
        modules_to_save=["embed_tokens"],
    )
    result, _ = merged(tmp_path / "base", adapter, tmp_path / "merged")
    expected = model.dense | {"thinker.model.embed_tokens.weight": values.to(torch.bfloat16)}
    layouts.assert_tensors(tmp_path / "merged", expected)
    name = "thinker.model.embed_tokens.weight"
    assert result["notes"] == [f"{adapter}: {name} is replaced"]
