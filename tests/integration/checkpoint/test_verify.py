"""int4-lora verify: every module against upstream, and upstream's own faults by name."""

import json
import shutil
import sys

import pytest
import torch
from typer.testing import CliRunner

from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint import verify as verification
from int4_lora.integration.checkpoint.verify import same_bits, verify
from int4_lora.integration.cli.app import app
from support.checkpoints import Q_PROJ, edit_config, edit_tensors, weights
from support.tiny import VARIANTS
from support.upstream_versions import GUESSES_BLOCKS, IGNORES_G_IDX
from support.weights import random_weight

pytestmark = pytest.mark.versions


def run(*arguments):
    return CliRunner().invoke(app, ["verify", *(str(one) for one in arguments)])


def q_proj_of(folder):
    return next(finding for finding in verify(open_checkpoint(folder)) if finding.name == Q_PROJ)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_same(tiny_models, variant):
    result = run(tiny_models[variant], "--json")
    found = json.loads(result.stdout)
    wrong = variant == "actorder-g128" and IGNORES_G_IDX
    assert result.exit_code == wrong, result.output
    expected = "upstream_wrong" if wrong else "same"
    assert {module["verdict"] for module in found["modules"]} == {expected}
    if wrong:
        assert {module["detail"] for module in found["modules"]} == {"weight_g_idx is ignored"}


def test_the_summary(tiny_models):
    result = run(tiny_models["g128"])
    assert result.exit_code == 0
    assert "14 modules against compressed-tensors" in result.output
    assert "14 same" in result.output


def test_an_upstream_that_ignores_g_idx_is_named(tiny_models, monkeypatch):
    def forgetful(tensors, *how):
        return decompress({k: v for k, v in tensors.items() if k != "weight_g_idx"}, *how)

    decompress = verification.decompress_tensors
    monkeypatch.setattr(verification, "decompress_tensors", forgetful)
    result = run(tiny_models["actorder-g128"])
    assert result.exit_code == 1
    assert "upstream_wrong" in result.output
    assert "weight_g_idx is ignored" in " ".join(result.output.split())


def test_an_upstream_that_guesses_blocks_is_named(tiny_models, tmp_path):
    """compressed-tensors up to 0.17 takes 20 rows in blocks of 16 for two blocks of 10."""
    blocks = random_weight("block", rows=20, columns=48, block=(16, 8), dtype=torch.bfloat16)
    copied = shutil.copytree(tiny_models["g128"], tmp_path / "copied")
    edit_config(copied, weights(strategy="block", group_size=None, block_structure=[16, 8]))
    edit_tensors(
        copied,
        weight_packed=lambda _: blocks.packed,
        weight_scale=lambda _: blocks.scale,
        weight_shape=lambda _: torch.tensor([20, 48]),
    )
    finding = q_proj_of(copied)
    assert finding.verdict == ("upstream_wrong" if GUESSES_BLOCKS else "same")
    if GUESSES_BLOCKS:
        assert finding.detail == "blocks are taken to be (10, 8), not (16, 8)"


def test_what_nothing_explains_is_different(tiny_models, monkeypatch):
    decompress = verification.decompress_tensors
    last_place = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
    for change in (
        lambda dense: -dense,
        lambda dense: dense + dense.abs() * last_place[dense.dtype] * 1.5,  # one bit
        lambda dense: torch.where(dense == 0, -dense, dense),  # the sign of zero
    ):
        monkeypatch.setattr(
            verification, "decompress_tensors", lambda *given, by=change: by(decompress(*given))
        )
        finding = q_proj_of(tiny_models["g32"])
        assert finding.verdict == "different"
        assert "of 65536 weights differ" in finding.detail


def test_an_upstream_that_raises_is_named(tiny_models, monkeypatch):
    def broken(*given):
        raise RuntimeError("size mismatch\nand more")

    monkeypatch.setattr(verification, "decompress_tensors", broken)
    finding = q_proj_of(tiny_models["g32"])
    assert finding.detail == "compressed-tensors cannot decompress it: RuntimeError: size mismatch"


def test_a_module_that_cannot_be_read_does_not_stop_the_others(copied_model):
    edit_tensors(copied_model, weight_scale=lambda scale: scale[1:])
    result = run(copied_model, "--json")
    assert result.exit_code == 2
    verdicts = [module["verdict"] for module in json.loads(result.stdout)["modules"]]
    assert sorted(verdicts) == ["same"] * 13 + ["unreadable"]
    table = " ".join(run(copied_model).output.replace("│", " ").replace("┃", " ").split())
    assert "[out_features, groups]" in table  # nothing of a message is taken for markup


def test_a_file_that_goes_away_meanwhile_is_not_upstreams_fault(copied_model):
    checkpoint = open_checkpoint(copied_model)
    (copied_model / "model.safetensors").unlink()
    assert {finding.verdict for finding in verify(checkpoint)} == {"unreadable"}


def test_other_formats_are_left_out(copied_model):
    edit_config(copied_model, weights(num_bits=3))
    assert {finding.verdict for finding in verify(open_checkpoint(copied_model))} == {"not_int4"}
    assert run(copied_model).exit_code == 2  # nothing was compared


def test_refuses(tmp_path):
    result = run(tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "is not a folder with a checkpoint" in result.output


def test_without_compressed_tensors_the_extra_is_named(tiny_models, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
    result = run(tiny_models["g32"])
    assert result.exit_code == 2
    assert "int4-lora[checkpoints]" in result.output
    assert result.output.count("\n") == 1


def test_same_bits():
    nan, other_nan = torch.tensor([0x7FC0, 0x7FC1], dtype=torch.int16).view(torch.bfloat16)
    one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    assert same_bits(nan[None], other_nan[None])
    assert same_bits(one, one.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(one, one.double())
    assert not same_bits(one, torch.ones(2))
    assert not same_bits(one, one * float("nan"))
    assert not same_bits(one, torch.nextafter(one, zero))
