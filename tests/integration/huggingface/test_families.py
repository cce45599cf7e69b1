"""Packed models of the families that people have, against their dense twins in float64."""

import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from int4_lora.integration.huggingface import Int4Experts, Int4Linear, load_packed
from support.families import EXPERTS, FAMILIES, make_family
from support.whole_models import assert_as_good, in_float64

FUSES_EXPERTS = Version("5") <= Version(transformers.__version__)
pytestmark = [
    pytest.mark.versions,
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning"),  # of experts
]
TOKENS = torch.arange(1, 25).view(2, 12) * 7 % 90


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that returns a family's folder, and its packed modules by stored name."""
    folders = {}

    def of(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp("family")
            folders[name] = folder, make_family(folder, name)
        return folders[name]

    return of


def dense_model(folder, name, dtype):
    kind = getattr(transformers, FAMILIES[name][0])
    model = kind.from_pretrained(folder / "dense", dtype=dtype)
    if FUSES_EXPERTS:
        model.set_experts_implementation("eager")  # the others have no float64
    return model.to(dtype).eval()  # the rotary buffers, too


def layers_of(model):
    kinds = (Int4Linear, Int4Experts)
    return {name: one for name, one in model.named_modules() if isinstance(one, kinds)}


def packed_modules(model):
    """Return how many of the checkpoint's modules a model keeps packed."""
    return sum(
        3 * one.num_experts if isinstance(one, Int4Experts) else 1
        for one in layers_of(model).values()
    )


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(made, name):
    folder, stored = made(name)
    model = load_packed(folder / "int4", dtype=torch.float32)
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert packed_modules(model) == len(stored)
    fused = [one for one in layers_of(model).values() if isinstance(one, Int4Experts)]
    assert bool(fused) == (FUSES_EXPERTS and name in EXPERTS)
    assert all(
        getattr(one, "down_proj" if one in fused else "weight").dtype == torch.float32
        for one in layers_of(model).values()
    )
    theirs = logits(dense_model(folder, name, torch.float32))
    truth = in_float64(logits, dense_model(folder, name, torch.float64))
    assert_as_good(logits(model), theirs, truth)


@pytest.mark.parametrize("name", FAMILIES)
def test_save_pretrained_writes_the_checkpoint_again(made, tmp_path, name):
    folder, _ = made(name)
    load_packed(folder / "int4").save_pretrained(tmp_path / "saved")
    expected = load_file(folder / "int4" / "model.safetensors")
    if not FUSES_EXPERTS:  # transformers 4 casts it as it loads
        expected = {
            key: tensor.bfloat16() if key.endswith("e_score_correction_bias") else tensor
            for key, tensor in expected.items()
        }
    assert_same(load_file(tmp_path / "saved" / "model.safetensors"), expected)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_training(made, name):
    folder, _ = made(name)
    torch.manual_seed(0)
    model = get_peft_model(
        load_packed(folder / "int4", dtype=torch.float32),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    layers = {name.partition(".base_layer")[0] for name in layers_of(model)}
    trained = [one for one in model.parameters() if one.requires_grad]
    losses = []
    for _ in range(2):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        norm = torch.cat([one.grad.flatten() for one in trained if one.grad is not None]).norm()
        for key, one in model.named_parameters():
            if key.partition(".lora_")[0] in layers and ".lora_" in key:
                if one.grad is None:  # transformers 4 leaves out experts that no token chooses
                    assert not FUSES_EXPERTS, key
                    assert ".experts." in key, key
                    continue
                assert one.grad.any(), key
                assert one.grad.isfinite().all(), key
        with torch.no_grad():
            for one in trained:
                if one.grad is not None:
                    one -= 0.1 * one.grad / norm
                    one.grad = None
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_merged_experts_are_saved_as_dense_ones(made, tmp_path, name):
    folder, _ = made(name)
    adapted = get_peft_model(
        load_packed(folder / "int4", dtype=torch.float32),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    ).eval()
    before = logits(adapted)
    merged = adapted.merge_and_unload()
    assert not layers_of(merged)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == load_file(folder / "dense" / "model.safetensors").keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = type(merged).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(logits(again), logits(merged))
