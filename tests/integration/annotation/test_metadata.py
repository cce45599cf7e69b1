"""lora_metadata.json: its schema takes it and nothing else, and it is enough to unpack a weight."""

import copy
import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import torch

from int4_lora.integration import annotate, open_checkpoint
from int4_lora.reference import dequantize
from support.checkpoints import Q_PROJ, edit_config, edit_tensors, shard
from support.tiny import VARIANTS

pytestmark = pytest.mark.versions

PAGE = (Path(__file__).parents[3] / "docs" / "lora-metadata.md").read_text()
DOWN_PROJ = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def validator():
    file = files("int4_lora.integration.annotation").joinpath("lora_metadata.schema.json")
    schema = json.loads(file.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def written(tiny_models, tmp_path_factory):
    """Return the metadata of an asymmetric model."""
    folder = tmp_path_factory.mktemp("written") / "model"
    return metadata_of(shutil.copytree(tiny_models["asym-g32"], folder))


def metadata_of(folder):
    annotate(folder)
    return json.loads((folder / "lora_metadata.json").read_text(encoding="utf-8"))


def unpacked_by_hand(folder, monkeypatch, desk):
    """Run the page's own program in a folder whose ``model`` is the checkpoint."""
    (desk / "model").symlink_to(folder)
    monkeypatch.chdir(desk)
    *_, program = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    space = {}
    exec(program, space)
    return space["weights"]


def check(folder, validator, monkeypatch, desk):
    """Check that a checkpoint's metadata is valid and enough; return it."""
    metadata = metadata_of(folder)
    validator.validate(metadata)
    checkpoint = open_checkpoint(folder)
    assert list(metadata["modules"]) == checkpoint.modules()
    weights = unpacked_by_hand(folder, monkeypatch, desk)
    assert list(weights) == checkpoint.modules()
    for name, weight in weights.items():
        right = dequantize(checkpoint.packed_weight(name))
        assert weight.dtype == right.dtype
        assert torch.equal(weight.view(torch.int16), right.view(torch.int16)), name
    return metadata


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_enough_to_unpack_every_variant(
    variant, tiny_models, tmp_path, monkeypatch, validator
):
    folder = shutil.copytree(tiny_models[variant], tmp_path / "copied")
    module = check(folder, validator, monkeypatch, tmp_path)["modules"][DOWN_PROJ]
    settings = VARIANTS[variant]
    assert module["bits"] == settings.get("num_bits", 4)
    assert module["strategy"] == settings["strategy"]
    assert module["group_size"] == settings.get("group_size")
    assert module["symmetric"] == settings.get("symmetric", True)
    assert module["g_idx"] == (variant == "actorder-g128")
    assert (module["shape"], module["dtype"]) == ([256, 512], "bfloat16")


def test_it_is_enough_for_shards(copied_model, tmp_path, monkeypatch, validator):
    shard(copied_model)
    metadata = check(copied_model, validator, monkeypatch, tmp_path)
    named = [one["file"] for module in metadata["modules"].values()
             for one in module["tensors"].values()]  # fmt: skip
    assert len(set(named)) == 3


@pytest.mark.parametrize(
    ("weights", "shape", "covers"),
    [
        ({"strategy": "tensor"}, [1], [256, 256]),
        ({"strategy": "tensor"}, [], [256, 256]),
        ({"strategy": "block", "block_structure": [96, 64]}, [3, 4], [96, 64]),
    ],
)
def test_zero_points_that_are_not_packed(
    copied_model, tmp_path, monkeypatch, validator, weights, shape, covers
):
    settings = {"num_bits": 4, "type": "int", "symmetric": False, **weights}
    group = {"targets": [Q_PROJ], "weights": settings, "format": "pack-quantized"}
    edit_config(copied_model, lambda _, q: q["config_groups"].update(group_1=group))
    count = torch.Size(shape).numel()
    scale = torch.linspace(0.01, 0.07, count).bfloat16().reshape(shape)
    zero_point = (torch.arange(count) % 16 - 8).to(torch.int8).reshape(shape)
    edit_tensors(copied_model, weight_scale=lambda _: scale, weight_zero_point=lambda _: zero_point)
    module = check(copied_model, validator, monkeypatch, tmp_path)["modules"][Q_PROJ]
    assert module["packing"]["zero_point_dim"] is None
    assert module["scale_covers"] == covers
    edit_tensors(copied_model, weight_zero_point=lambda _: torch.full_like(zero_point, 8))
    with pytest.raises(ValueError, match=rf"{Q_PROJ}: zero_point must be in \[-8, 7\], got 8"):
        annotate(copied_model)


def test_a_minus_one_in_g_idx_means_column_order(tiny_models, tmp_path, monkeypatch, validator):
    folder = shutil.copytree(tiny_models["actorder-g128"], tmp_path / "copied")
    edit_tensors(folder, weight_g_idx=lambda g_idx: g_idx.index_fill(0, torch.tensor([3]), -1))
    modules = check(folder, validator, monkeypatch, tmp_path)["modules"]
    assert (modules[Q_PROJ]["g_idx"], modules[DOWN_PROJ]["g_idx"]) == (False, True)


def test_modules_of_other_formats_are_left_out(copied_model, validator):
    edit_config(copied_model, lambda _, q: q["config_groups"]["group_0"].update(format="dense"))
    metadata = metadata_of(copied_model)
    validator.validate(metadata)
    assert metadata["modules"] == {}
    assert not metadata["lora_compatible"]


def test_the_pages_module_is_the_one_that_is_written(written):
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.S)
    assert json.loads(example) == written["modules"][DOWN_PROJ]


def test_the_page_has_a_row_for_every_member(validator):
    schema = validator.schema
    members = {*schema["properties"], *schema["$defs"]["module"]["properties"]} - {"packing"}
    members |= {f"packing.{name}" for name in schema["$defs"]["packing"]["properties"]}
    assert set(re.findall(r"^\| `([$\w.]+)`", PAGE, flags=re.M)) == members
    assert {*schema["$defs"]["tensor"]["properties"]} == {"name", "file", "dtype", "shape"}


def test_a_module_has_a_line(copied_model):
    annotate(copied_model)
    text = (copied_model / "lora_metadata.json").read_text(encoding="ascii")
    assert sum(line.startswith('    "model.layers.') for line in text.splitlines()) == 14
    assert text.endswith("\n  }\n}\n")


def change(*path, **changes):
    def apply(metadata):
        for key in path:
            metadata = metadata[key]
        for key, value in changes.items():
            if value is None:
                del metadata[key]
            else:
                metadata[key] = value

    return apply


MODULE = ("modules", Q_PROJ)


@pytest.mark.parametrize(
    "spoil",
    [
        *(change(**{key: None}) for key in ("version", "lora_compatible", "modules")),
        change(version=2),
        change(author="someone"),
        change(lora_compatible="yes"),
        change(lora_compatible=False),  # and no reason
        change(incompatible_because=["no"]),  # and compatible
        change(lora_target_modules="q_proj"),
        change(suggested_lora_targets=["q_proj", "q_proj"]),
        *(change(*MODULE, **{key: None}) for key in ("shape", "bits", "packing", "tensors")),
        change(*MODULE, bits=3),
        change(*MODULE, bits=8),  # and 8 codes in a word
        change(*MODULE, shape=[256]),
        change(*MODULE, shape=[256, 0]),
        change(*MODULE, dtype="float8_e4m3fn"),
        change(*MODULE, strategy="token"),
        change(*MODULE, group_size="32"),
        change(*MODULE, group_size=[32, 32]),  # and no blocks
        change(*MODULE, strategy="channel"),  # and a group size
        change(*MODULE, symmetric=True),  # and zero-points
        change(*MODULE, g_idx=True),  # and no g_idx
        change(*MODULE, more=1),
        change(*MODULE, "packing", offset=0),
        change(*MODULE, "packing", first_code="highest_bits"),
        change(*MODULE, "packing", zero_point_dim=1),
        change(*MODULE, "tensors", zero_point=None),  # and asymmetric
        change(*MODULE, "tensors", scale=None),
        change(*MODULE, "tensors", "packed", file="../model.safetensors"),
        change(*MODULE, "tensors", "packed", dtype="I32"),
        change(*MODULE, "tensors", "packed", name=None),
    ],
)
def test_the_schema_takes_nothing_else(written, validator, spoil):
    spoilt = copy.deepcopy(written)
    spoil(spoilt)
    assert spoilt != written
    assert validator.is_valid(written)
    assert not validator.is_valid(spoilt)
