"""Tensors that are in the files, but not in the index: listed, refused, taken or left."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from int4_lora.integration import annotate, open_checkpoint
from int4_lora.integration.adapter.read import read_adapter
from int4_lora.integration.annotation.write import preview_annotation
from int4_lora.integration.checkpoint.verify import verify
from int4_lora.integration.conversion import merge_checkpoint, unpack_checkpoint
from int4_lora.integration.conversion.merge import plan_merge
from int4_lora.integration.conversion.unpack import plan_unpack
from support.conversion import bytes_of, convert, run, tensors_of
from support.handmade import INDEX, make_adapter, read_index, small, write_index

DOWN = "model.layers.1.mlp.down_proj"
LEFT_OUT = ["lm_head.weight", *(f"{DOWN}.weight_{p}" for p in ("packed", "scale", "shape"))]
SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture
def source(tmp_path):
    """Return a checkpoint in three shards, whose index names everything."""
    return small().save(tmp_path / "source", shards=3)


@pytest.fixture
def lora(tmp_path):
    make_adapter(tmp_path / "lora", {"model.layers.0.self_attn.q_proj": (64, 64)})
    return tmp_path / "lora"


def leave_out(folder, names=LEFT_OUT):
    """Remove tensors from the index."""
    index = {name: file for name, file in read_index(folder).items() if name not in names}
    write_index(folder, index)


def check_refused(folder, lora, *messages):
    """Check that whatever would lose tensors refuses a checkpoint, and changes nothing."""
    before, target = bytes_of(folder.parent), folder.parent / "target"
    merging = ["merge", folder, target, f"--adapter={lora}"]
    for command in (
        ["verify", folder],
        ["annotate", folder],
        ["annotate", folder, "--dry-run"],
        ["unpack", folder, target],
        merging,
        [*merging, "--to=int4"],
    ):
        result = run(*command)
        assert result.exit_code == 2, result.output
        for message in messages:
            assert message in result.stderr
    opened, adapters = open_checkpoint(folder), [(read_adapter(lora), 1.0)]
    for call in (
        lambda: verify(opened),
        lambda: plan_unpack(opened),
        lambda: plan_merge(opened, adapters),
        lambda: plan_merge(opened, adapters, to="int4"),
        lambda: annotate(folder),
        lambda: preview_annotation(folder),
        lambda: unpack_checkpoint(folder, target),
        lambda: merge_checkpoint(folder, target, [(lora, 1.0)]),
    ):
        with pytest.raises(ValueError, match="unlisted"):
            call()
    assert bytes_of(folder.parent) == before


def test_what_the_index_leaves_out_is_refused_taken_or_left(source, lora, tmp_path):
    whole = small().dense
    leave_out(source)
    check_refused(source, lora, *LEFT_OUT, "leaves out", "--unlisted take", "--unlisted leave")
    convert("unpack", source, tmp_path / "taken", "--unlisted=take")
    taken = tensors_of(tmp_path / "taken")
    assert taken.keys() == whole.keys()
    assert all(torch.equal(taken[name], whole[name]) for name in whole)
    left = convert("unpack", source, tmp_path / "left", "--unlisted=leave")
    assert all(any(name in note for note in left["notes"]) for name in LEFT_OUT)
    assert all(note.startswith("left behind: ") for note in left["notes"])
    assert whole.keys() - tensors_of(tmp_path / "left").keys() == {
        "lm_head.weight",
        f"{DOWN}.weight",
    }
    for to in ("dense", "int4"):
        options = [f"--adapter={lora}", f"--to={to}"]
        notes = convert("merge", source, tmp_path / to, *options, "--unlisted=take")["notes"]
        assert notes == []
        notes = convert("merge", source, tmp_path / f"{to}-left", *options, "--unlisted=leave")
        assert notes["notes"] == left["notes"]
    assert tensors_of(tmp_path / "dense").keys() == whole.keys()
    assert tensors_of(tmp_path / "int4").keys() == small().stored.keys()
    verified = json.loads(run("verify", source, "--unlisted=take", "--json").stdout)
    assert len(verified["modules"]) == 4
    assert run("verify", source, "--unlisted=leave").exit_code == 0
    assert run("annotate", source, "--unlisted=take").exit_code == 0
    described = json.loads((source / "lora_metadata.json").read_text())["modules"]
    assert DOWN in described


def test_transformers_reads_what_the_index_leaves_out(source):
    """So the default must not be to go without it."""
    from transformers.modeling_utils import load_state_dict

    leave_out(source, ["lm_head.weight"])
    shards = set(read_index(source).values())
    assert any("lm_head.weight" in load_state_dict(str(source / shard)) for shard in shards)
    assert "lm_head.weight" not in open_checkpoint(source).tensors
    assert "lm_head.weight" in open_checkpoint(source, unlisted="take").tensors


def test_inspect_lists_them(source):
    packed = f"{DOWN}.weight_packed"
    held = f"1 tensor is in {read_index(source)[packed]} and not listed as the model's: {packed}"
    leave_out(source)
    result = run("inspect", source)
    assert result.exit_code == 0
    assert held in " ".join(result.output.split())
    found = json.loads(run("inspect", source, "--json").stdout)["unlisted"]
    assert sorted(name for file in found for name in file["tensors"]) == sorted(LEFT_OUT)
    assert all((file["copies"], file["fault"]) == ([], None) for file in found)


def test_a_module_without_an_unlisted_part_says_where_it_is(source):
    leave_out(source, [f"{DOWN}.weight_packed"])
    result = run("inspect", source)
    assert result.exit_code == 2
    held = "-of-00003.safetensors, but not listed as the model's"
    assert "weight_packed of a packed module is missing: it is in" in result.stderr
    assert held in result.stderr
    leave_out(source, [*read_index(source)][:-1])
    assert "lists none" in run("inspect", source).stderr


def test_a_tensor_in_two_shards_cannot_be_taken(source, lora, tmp_path):
    other = next(file for file in read_index(source).values() if file != SHARD)
    tensors = load_file(source / SHARD)
    name, kept = next((one, tensors[one]) for one in tensors if one.endswith("norm.weight"))
    save_file({**load_file(source / other), name: torch.zeros_like(kept)}, source / other)
    check_refused(source, lora, f"{other} holds {name} too", "lists in another file",
                  "cannot be taken", "--unlisted leave")  # fmt: skip
    for command in (["verify"], ["unpack", tmp_path / "dense"]):
        result = run(command[0], source, *command[1:], "--unlisted=take")
        assert result.exit_code == 2
        assert f"{name} would be in two files" in result.stderr
    convert("unpack", source, tmp_path / "dense", "--unlisted=leave")
    assert torch.equal(tensors_of(tmp_path / "dense")[name], kept)  # the index's


def test_a_tensor_that_two_shards_hold_and_no_index_names(source):
    first, second, *_ = sorted(set(read_index(source).values()))
    for file in (first, second):
        save_file({**load_file(source / file), "extra": torch.ones(2)}, source / file)
    with pytest.raises(ValueError, match=f"taken: extra is in {first} and in {second}"):
        open_checkpoint(source, unlisted="take")
    assert "extra" not in open_checkpoint(source, unlisted="leave").tensors


def test_a_file_that_nobody_names(source, lora, tmp_path):
    save_file({"layers.0.attention.wq.weight": torch.ones(4, 4)},
              source / "consolidated.safetensors")  # fmt: skip
    check_refused(
        source,
        lora,
        "consolidated.safetensors holds layers.0.attention.wq.weight, and is not named by "
        f"{INDEX}. --unlisted take",
    )
    outcome = convert("unpack", source, tmp_path / "left", "--unlisted=leave")
    assert outcome["left"] == ["consolidated.safetensors"]
    assert tensors_of(tmp_path / "left").keys() == small().dense.keys()
    outcome = convert("unpack", source, tmp_path / "taken", "--unlisted=take")
    assert outcome["left"] == []
    assert "layers.0.attention.wq.weight" in tensors_of(tmp_path / "taken")


@pytest.mark.parametrize("kind", ["bytes", "link", "nowhere"])
def test_a_file_that_nobody_names_or_can_read(source, lora, tmp_path, kind):
    file = source / "extra.safetensors"
    if kind == "bytes":
        file.write_bytes(b"\xff" * 64)
    else:
        elsewhere = tmp_path / "elsewhere.safetensors"
        if kind == "link":
            save_file({"x": torch.ones(1)}, elsewhere)
        file.symlink_to(elsewhere)
    said = {"bytes": "not a readable safetensors file", "link": "a link that leaves the folder",
            "nowhere": "a link that leaves the folder"}[kind]  # fmt: skip
    check_refused(source, lora, "extra.safetensors is not named by", said, "cannot be taken")
    assert open_checkpoint(source).unlisted[0].fault is not None
    assert said in " ".join(run("inspect", source).output.split())
    convert("unpack", source, tmp_path / "dense", "--unlisted=leave")


def test_folders_and_hidden_files_are_not_looked_at(source, tmp_path):
    (source / "folder.safetensors").mkdir()
    (source / "._model.safetensors").write_bytes(b"resource fork")
    assert not open_checkpoint(source).unlisted
    convert("unpack", source, tmp_path / "dense")


def test_shards_beside_a_single_file(source, lora, tmp_path):
    """Transformers reads the single file, vLLM what the index names: neither is dropped."""
    everything = {name: one for file in set(read_index(source).values())
                  for name, one in load_file(source / file).items()}  # fmt: skip
    head = everything.pop("lm_head.weight")
    save_file(everything, source / "model.safetensors")
    check_refused(source, lora, "holds lm_head.weight, and is not read beside model.safetensors",
                  "too, and is not read beside model.safetensors")  # fmt: skip
    convert("unpack", source, tmp_path / "dense", "--unlisted=leave")
    assert "lm_head.weight" not in tensors_of(tmp_path / "dense")
    for file in sorted(set(read_index(source).values())):
        (source / file).unlink()
    save_file({"lm_head.weight": head}, source / "head.safetensors")
    convert("unpack", source, tmp_path / "taken", "--unlisted=take")
    assert tensors_of(tmp_path / "taken").keys() == small().dense.keys()


def test_an_index_beside_a_single_file(tmp_path):
    folder = small().save(tmp_path / "x")
    names = small().stored
    write_index(folder, dict.fromkeys(names, "gone.safetensors"))  # joined, and never removed
    assert not open_checkpoint(folder).unlisted
    write_index(folder, dict.fromkeys([*names, "extra"], "gone.safetensors"))
    with pytest.raises(ValueError, match="extra is said to be in gone"):
        open_checkpoint(folder)


def test_the_choice_has_two_values(source):
    with pytest.raises(ValueError, match="unlisted must be 'take', 'leave' or None, got 'both'"):
        open_checkpoint(source, unlisted="both")
    assert run("unpack", source, source.parent / "dense", "--unlisted=both").exit_code == 2
    for unlisted in ("take", "leave"):  # which change nothing if nothing is unlisted
        opened = open_checkpoint(source, unlisted=unlisted)
        opened.check_listed()
        assert opened.tensors.keys() == small().stored.keys()


def test_an_adapter_in_the_folder_is_not_the_models(source, tmp_path):
    make_adapter(tmp_path / "lora", {"model.layers.0.self_attn.q_proj": (64, 64)})
    for file in (tmp_path / "lora").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    assert not open_checkpoint(source).unlisted
    assert convert("unpack", source, tmp_path / "dense")["left"] == []
    (source / "adapter_config.json").unlink()  # without it nobody would read the adapter
    (unlisted,) = open_checkpoint(source).unlisted
    assert unlisted.file.name == "adapter_model.safetensors"
