"""What llm-compressor's ``oneshot`` writes: it opens, verifies, and is annotated."""

import json
import shutil

import transformers

from int4_lora.integration import annotate, open_checkpoint
from int4_lora.integration.checkpoint.inspect import inspect
from int4_lora.integration.checkpoint.verify import verify
from int4_lora.integration.vllm_plugin.metadata import LoRAMetadata, read_metadata

ALL = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def test_it_opens_and_verifies(quantised):
    checkpoint = open_checkpoint(quantised.folder)
    assert len(checkpoint.modules()) == 14
    assert {one.verdict for one in verify(checkpoint)} == {"same"}
    for one in inspect(checkpoint).modules:
        found = (one.bits, one.symmetric, one.packed)
        assert found == (quantised.bits, quantised.symmetric, True)
        assert one.nan_scales == one.infinite_scales == 0


def test_it_is_annotated(quantised, tmp_path):
    folder = shutil.copytree(quantised.folder, tmp_path / "annotated")
    old = {file.name: file.read_bytes() for file in folder.iterdir()}
    found = annotate(folder)
    new = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {name for name in new if new[name] != old.get(name)} == {*found.changed}
    assert found.changed == ("lora_metadata.json", "config.json")
    targets = ALL if quantised.bits == 4 else ()
    assert (found.lora_compatible, found.lora_target_modules) == (bool(targets), targets)
    config = json.loads(new["config.json"])
    assert read_metadata(config, folder) == LoRAMetadata(bool(targets), targets)
    described = json.loads(new["lora_metadata.json"])["modules"]
    assert list(described) == open_checkpoint(folder).modules()
    assert {one["symmetric"] for one in described.values()} == {quantised.symmetric}
    assert {one["group_size"] for one in described.values()} <= {128, None}
    assert annotate(folder).changed == ()
    loaded = transformers.AutoConfig.from_pretrained(folder)
    assert read_metadata(loaded.to_dict()) == LoRAMetadata(bool(targets), targets)
