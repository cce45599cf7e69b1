import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from int4_lora.integration import open_checkpoint
from int4_lora.integration.huggingface import keep, keep_packed
from int4_lora.integration.huggingface.mapped_files import MappedFile, is_mapped, mapped_files
from support.checkpoints import Q_PROJ, edit_tensors

pytestmark = pytest.mark.versions
NAME = f"{Q_PROJ}.weight_packed"
SMAPS = """\
00400000-00452000 r-xp 00001000 08:02 173521      /usr/bin/an editor
Size:                328 kB
Anonymous:             0 kB
AnonHugePages:         4 kB
00651000-00652000 rw-p 00000000 08:02 173521      /data/written
Anonymous:             4 kB
01a00000-01a21000 rw-p 00000000 00:00 0           [heap]
Anonymous:             0 kB
7f0000000000-7f0000001000 rw-p 00000000 00:00 0 
Anonymous:             0 kB
"""  # noqa: W291


def test_the_systems_list_is_read(tmp_path):
    (tmp_path / "smaps").write_text(SMAPS)
    assert mapped_files(tmp_path / "smaps") == [
        MappedFile(0x400000, 0x452000, 0x1000, "/usr/bin/an editor")
    ]
    assert mapped_files(tmp_path / "absent") == []


@pytest.fixture
def mapped(square, tmp_path):
    """Return the file of a checkpoint, a tensor that is mapped from it, and its place there."""
    if sys.platform != "linux":
        pytest.skip("only Linux lists what is mapped")
    folder = shutil.copytree(square("g32"), tmp_path / "model")
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return folder, opened.get_tensor(NAME), open_checkpoint(folder).tensors[NAME]


def test_a_mapped_tensor_is_known_without_reading_it(mapped):
    _, words, place = mapped
    assert is_mapped(words, place, mapped_files())
    assert not is_mapped(words.clone(), place, mapped_files())
    assert not is_mapped(words[1:], place, mapped_files())
    assert not is_mapped(words.T, place, mapped_files())
    assert not is_mapped(words.to("meta"), place, mapped_files())


def test_a_tensor_at_another_place_is_not_taken_for_it(mapped):
    folder, words, _ = mapped
    tensors = open_checkpoint(folder).tensors
    others = [
        place for name, place in tensors.items() if place.nbytes == words.nbytes and name != NAME
    ]
    assert others
    assert not any(is_mapped(words, place, mapped_files()) for place in others)


def test_a_tensor_that_was_written_to_is_not_the_files(mapped):
    _, words, place = mapped
    words[0, 0] ^= 1
    assert not is_mapped(words, place, mapped_files())


def test_a_replaced_file_is_not_the_one_that_is_mapped(mapped):
    folder, words, _ = mapped
    edit_tensors(folder, weight_packed=lambda tensor: tensor ^ 1)
    assert not is_mapped(words, open_checkpoint(folder).tensors[NAME], mapped_files())


@pytest.mark.parametrize("known", [True, False])
def test_words_are_compared_unless_they_are_known_to_be_the_files(square, monkeypatch, known):
    model = AutoModelForCausalLM.from_pretrained(square("g128"), dtype=torch.bfloat16)
    if not known:
        monkeypatch.setattr(keep, "mapped_files", list)
    elif sys.platform != "linux":
        pytest.skip("only Linux lists what is mapped")
    compared = []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "equal", lambda *tensors: compared.append(tensors) or True)
        keep_packed(model)
    words = [pair for pair in compared if pair[0].shape == (256, 256 // 8)]
    assert len(words) == (0 if known else 14)
    state = model.state_dict()
    for name, tensor in load_file(square("g128") / "model.safetensors").items():
        assert torch.equal(state[name], tensor), name
