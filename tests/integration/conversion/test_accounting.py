"""Nothing is lost between source, plan and result: faults are planted in each and noticed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from int4_lora.integration import open_checkpoint
from int4_lora.integration.conversion import convert as conversion
from int4_lora.integration.conversion import merge, unpack, unpack_checkpoint
from int4_lora.integration.conversion.dense_modules import DenseModule
from int4_lora.integration.conversion.tasks import Copy
from support.checkpoints import edit_config
from support.conversion import convert, run, tensors_of
from support.handmade import (
    INDEX,
    Handmade,
    make_adapter,
    quantization,
    read_index,
    small,
    write_index,
)

Q_PROJ = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"


@pytest.fixture
def source(tmp_path):
    return small().save(tmp_path / "source", shards=2)


@pytest.mark.parametrize("to", ["dense", "int4"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda tasks: tasks[1:], "model.embed_tokens.weight would be lost: no step"),
        (lambda tasks: (*tasks, tasks[0]), "model.embed_tokens.weight would be used by two"),
        (lambda tasks: (*tasks, Copy("x", tasks[0].stored)), "x is not in the checkpoint"),
    ],
)
def test_a_plan_that_forgets_a_tensor_is_refused(source, tmp_path, monkeypatch, to, wrong, message):
    right = unpack.tasks_in_order
    for module in (unpack, merge):
        monkeypatch.setattr(module, "tasks_in_order", lambda *given: tuple(wrong(right(*given))))
    make_adapter(tmp_path / "lora", {Q_PROJ: (64, 64)})
    options = [f"--adapter={tmp_path / 'lora'}", f"--to={to}"]
    result = run("merge", source, tmp_path / "result", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "result").exists()


def test_a_part_that_a_step_does_not_use_is_noticed(source, monkeypatch):
    monkeypatch.setattr(DenseModule, "consumed", (f"{Q_PROJ}.weight_packed",))
    with pytest.raises(ValueError, match=r"would be used by two|would be lost"):
        unpack.plan_unpack(open_checkpoint(source))


def test_two_steps_that_make_one_name_are_refused(tmp_path):
    """Two modules of other formats cannot be told apart from their dense result."""
    made = small()
    made.save(tmp_path / "x")
    opened = open_checkpoint(tmp_path / "x")
    tasks = unpack.plan_unpack(opened).tasks
    twice = Copy(NORM, opened.tensors[NORM])
    twice.outputs = tasks[1].outputs
    plan = [task for task in tasks if NORM not in task.consumed]
    with pytest.raises(ValueError, match=f"{tasks[1].outputs[0].name} would be made by two steps"):
        unpack.check_accounted(opened.path, opened.tensors, [*plan, twice], {})


def test_what_has_no_place_is_dropped_for_a_reason(tmp_path):
    made = small()
    attention = "model.layers.0.self_attn"
    for part in ("k_scale", "v_scale"):
        made.stored[f"{attention}.{part}"] = torch.ones(1)
    made.stored[f"{Q_PROJ}.input_scale"] = torch.ones(1)
    made.stored[f"{Q_PROJ}.weight_of_the_future"] = torch.ones(1)
    folder = made.save(tmp_path / "x")
    outcome = convert("unpack", folder, tmp_path / "kept")
    assert outcome["dropped"] == {f"{Q_PROJ}.input_scale": "quantises the activations of a module"}
    kept = tensors_of(tmp_path / "kept")
    assert {f"{attention}.k_scale", f"{Q_PROJ}.weight_of_the_future"} <= kept.keys()
    edit_config(folder, lambda _, q: q.update(kv_cache_scheme={"num_bits": 8}))
    outcome = convert("unpack", folder, tmp_path / "dense")
    assert outcome["dropped"] == {
        f"{Q_PROJ}.input_scale": "quantises the activations of a module",
        f"{attention}.k_scale": "quantises the KV cache",
        f"{attention}.v_scale": "quantises the KV cache",
    }
    result = run("unpack", folder, tmp_path / "again")
    assert "without a place in the result: 2: each quantises the KV cache" in result.output


def test_weights_in_other_files_are_named(tmp_path):
    folder = small().save(tmp_path / "x")
    (folder / "original").mkdir()
    for name in ("pytorch_model.bin", "original/consolidated.00.pth"):
        (folder / name).write_bytes(b"x")
    assert convert("unpack", folder, tmp_path / "dense")["left"] == [
        "original/consolidated.00.pth",
        "pytorch_model.bin",
    ]
    said = run("unpack", folder, tmp_path / "again").output
    assert "weights left behind: original/consolidated.00.pth, pytorch_model.bin" in said
    assert "no other files" in said
    (folder / "tokenizer.json").write_text("{}")
    assert "1 other file: tokenizer.json" in run("unpack", folder, tmp_path / "third").output


def lose(place):
    file = next(place.glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)


def widen(place):
    file = next(place.glob("*.safetensors"))
    save_file({name: one.float() for name, one in load_file(file).items()}, file)


def reshape(place):
    file = next(place.glob("*.safetensors"))
    save_file({name: one[None] for name, one in load_file(file).items()}, file)


def stray(place):
    save_file({"stray": torch.ones(1)}, place / "stray.safetensors")


def repeat(place):
    first, second, *_ = sorted(place.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())


def forget(place):
    index = read_index(place)
    index.pop(sorted(index)[0])
    write_index(place, index)


def point_elsewhere(place):
    index = read_index(place)
    files = sorted(set(index.values()))
    index[sorted(index)[0]] = files[1] if index[sorted(index)[0]] == files[0] else files[0]
    write_index(place, index)


FAULTS = {
    "a tensor is missing": (lose, "in the files, got absent"),
    "a dtype": (widen, "got F32"),
    "a shape": (reshape, "must be BF16"),
    "a file too many": (stray, "stray must be absent in the files, got F32 [1]"),
    "a tensor in two files": (repeat, "is in two files of the result"),
    "a file is gone": (lambda place: next(place.glob("*.safetensors")).unlink(), "No such file"),
    "the index is gone": (lambda place: (place / INDEX).unlink(), f"{INDEX} is not there"),
    "the index forgets": (forget, f"in {INDEX}, got absent"),
    "the index lies": (point_elsewhere, f"in {INDEX}, got 'model-0000"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_result_that_is_not_as_planned_is_not_published(source, tmp_path, monkeypatch, fault):
    plant, message = FAULTS[fault]
    right = conversion.copy_files

    def copied(folder, names, place):
        right(folder, names, place)
        if names == ["config.json"]:  # the last that is written
            plant(place)

    monkeypatch.setattr(conversion, "copy_files", copied)
    make_adapter(tmp_path / "lora", {Q_PROJ: (64, 64)})
    command = ["merge", source, tmp_path / "result", f"--adapter={tmp_path / 'lora'}", "--to=int4"]
    result = run(*command, "--max-shard-size=0.00001")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "nothing was put in place; remove" in result.stderr
    assert not (tmp_path / "result").exists()
    monkeypatch.setattr(conversion, "copy_files", right)
    (partial,) = (tmp_path / "result.partial").iterdir()
    for file in sorted(partial.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    assert run(*command, "--max-shard-size=0.00001").exit_code == 0


def test_bytes_that_were_never_written_are_noticed(source, tmp_path, monkeypatch):
    right = Copy.run

    def half(task, write):
        right(task, lambda name, start, piece: write(name, start, piece.flatten()[:-1]))

    monkeypatch.setattr(Copy, "run", half)
    with pytest.raises(ValueError, match=r"bytes of .* were written"):
        unpack_checkpoint(source, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_a_module_of_another_format_with_two_weights_is_refused(tmp_path):
    made = Handmade()
    made.stored = {
        "a.weight": torch.zeros(4, 8, dtype=torch.int8),
        "a.weight_packed": torch.zeros(4, 8, dtype=torch.uint8),
        "a.weight_scale": torch.ones(4, 1),
    }
    config = {
        **quantization(strategy="channel", num_bits=8, type="float"),
        "format": "float-quantized",
    }
    made.save(tmp_path / "x", {"quantization_config": config})
    result = run("unpack", tmp_path / "x", tmp_path / "dense")
    assert result.exit_code == 2
    assert "a: weight is stored beside weight_packed" in result.stderr
    assert json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
