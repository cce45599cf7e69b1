"""Packed models of the families that people have, against their dense twins in float64."""

import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from int4_lora.integration.huggingface import Int4Linear, load_packed
from support.families import FAMILIES, make_family
from support.whole_models import assert_as_good, in_float64

FUSES_EXPERTS = Version("5") <= Version(transformers.__version__)
pytestmark = [
    pytest.mark.versions,
    pytest.mark.filterwarnings("ignore:these quantised modules stay:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning"),  # of experts
]
TOKENS = torch.arange(1, 25).view(2, 12) * 7 % 90
EXPERTS = [name for name in FAMILIES if name in ("Mixtral", "Qwen3-MoE")]
WITHOUT_FUSED = [name for name in FAMILIES if name not in EXPERTS or not FUSES_EXPERTS]


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
    return {name: one for name, one in model.named_modules() if isinstance(one, Int4Linear)}


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(made, name):
    folder, stored = made(name)
    model = load_packed(folder / "int4", dtype=torch.float32)
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    fused = [one for one in stored if ".experts." in one] if FUSES_EXPERTS else []
    assert len(layers_of(model)) == len(stored) - len(fused)
    assert bool(fused) == (FUSES_EXPERTS and name in EXPERTS)
    assert all(one.weight.dtype == torch.float32 for one in layers_of(model).values())
    theirs = logits(dense_model(folder, name, torch.float32))
    truth = in_float64(logits, dense_model(folder, name, torch.float64))
    assert_as_good(logits(model), theirs, truth)


@pytest.mark.parametrize("name", WITHOUT_FUSED)
def test_save_pretrained_writes_the_checkpoint_again(made, tmp_path, name):
    folder, _ = made(name)
    load_packed(folder / "int4").save_pretrained(tmp_path / "saved")
    expected = load_file(folder / "int4" / "model.safetensors")
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
    layers = {name.removesuffix(".base_layer") for name in layers_of(model)}
    trained = [one for one in model.parameters() if one.requires_grad]
    losses = []
    for _ in range(2):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        norm = torch.cat([one.grad.flatten() for one in trained if one.grad is not None]).norm()
        for key, one in model.named_parameters():
            if key.partition(".lora_")[0] in layers and ".lora_" in key:
                assert one.grad.any(), key
                assert one.grad.isfinite().all(), key
        with torch.no_grad():
            for one in trained:
                if one.grad is not None:
                    one -= 0.1 * one.grad / norm
                    one.grad = None
    assert losses[1] < losses[0]


@pytest.mark.skipif(not FUSES_EXPERTS, reason="transformers 4 keeps experts as linears")
@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts_are_named_and_stay_dense(made, tmp_path, name):
    folder, _ = made(name)
    with pytest.warns(UserWarning, match=r"experts\.\*\..* \(4 modules\): .* fuses them") as seen:
        model = load_packed(folder / "int4", dtype=torch.float32)
    assert len(seen) == 1
    assert str(seen[0].message).count("(4 modules)") == 3
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == load_file(folder / "dense" / "model.safetensors").keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = type(merged).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(logits(again), logits(merged))
