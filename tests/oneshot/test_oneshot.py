"""What llm-compressor's ``oneshot`` writes opens, verifies, and can be annotated."""

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
    assert {module.verdict for module in verify(checkpoint)} == {"same"}
    for module in inspect(checkpoint).modules:
        assert (module.bits, module.symmetric) == (quantised.bits, quantised.symmetric)
        assert module.packed
        assert module.nan_scales == module.infinite_scales == 0


def test_it_is_annotated(quantised, tmp_path):
    folder = shutil.copytree(quantised.folder, tmp_path / "annotated")
    old = {file.name: file.read_bytes() for file in folder.iterdir()}
    annotated = annotate(folder)
    new = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {name for name in new if new[name] != old.get(name)} == {*annotated.changed}
    assert annotated.changed == ("lora_metadata.json", "config.json")
    assert (annotated.lora_compatible, annotated.lora_target_modules) == (True, ALL)
    config = json.loads(new["config.json"])
    assert read_metadata(config, folder) == LoRAMetadata(True, ALL)
    described = json.loads(new["lora_metadata.json"])["modules"]
    assert list(described) == open_checkpoint(folder).modules()
    assert {module["symmetric"] for module in described.values()} == {quantised.symmetric}
    assert {module["group_size"] for module in described.values()} <= {128, None}
    assert annotate(folder).changed == ()
    loaded = transformers.AutoConfig.from_pretrained(folder)
    assert read_metadata(loaded.to_dict()) == LoRAMetadata(True, ALL)
