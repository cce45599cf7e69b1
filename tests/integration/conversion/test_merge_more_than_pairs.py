"""Merging whole tensors, rows and embeddings, tied or not, gives the logits that PEFT gives."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.conversion import convert, refusal, run, tensors_of
from support.trained import LLAMA, WITH_TODAYS_PEFT, llama, trained

pytestmark = WITH_TODAYS_PEFT

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
TOKENS = torch.arange(24).view(2, 12)
SETTINGS = {
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "embeddings-tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "head-tied": {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
    "whole-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole-embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole-tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
                   "ensure_weight_tying": True},
    "norms-and-linears": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "k_proj"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 19]},
    "rows-of-head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5]}},
    "rows-of-both": {"target_modules": ["q_proj"],
                     "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [5]}},
}  # fmt: skip
STAY_TIED = ("embeddings-tied", "head-tied", "whole-tied", "rows", "norms-and-linears")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return, by whether it is tied, an INT4 checkpoint and the dense one that it encodes."""
    from int4_lora.integration.demo import recipe

    folders = {}
    for tied in (False, True):
        root = tmp_path_factory.mktemp("base")
        model = llama(tie_word_embeddings=tied).to(torch.bfloat16)
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
        recipe.save_quantised(model, root / "int4", weights)
        convert("unpack", root / "int4", root / "dense", "--dtype", "float32")
        folders[tied] = (root / "int4", root / "dense")
    return folders


def load(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits.double()


def with_adapter(folder, adapter, dtype):
    from peft import PeftModel

    return PeftModel.from_pretrained(load(folder), adapter).to(dtype)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_logits_are_those_of_base_and_adapter(bases, tmp_path, settings, tied):
    source, dense = bases[tied]
    trained(load(dense), tmp_path / "adapter", **settings)
    adapter = f"--adapter={tmp_path / 'adapter'}"
    outcome = convert("merge", source, tmp_path / "merged", adapter, "--dtype", "float32")

    truth = logits(with_adapter(dense, tmp_path / "adapter", torch.float64))
    theirs = (logits(with_adapter(dense, tmp_path / "adapter", torch.float32)) - truth).abs().max()
    ours = (logits(load(tmp_path / "merged")) - truth).abs().max()
    assert ours <= 2 * theirs + 1e-6
    assert (logits(load(dense).double()) - truth).abs().max() > 1e-3  # the adapter shows

    stays = [SETTINGS[name] for name in STAY_TIED]
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["tie_word_embeddings"] is (tied and settings in stays)
    has_head = HEAD in tensors_of(tmp_path / "merged")
    assert has_head is not config["tie_word_embeddings"]
    notes = " ".join(outcome["notes"])
    assert (f"the result has {HEAD}" in notes) is (tied and settings not in stays)


def edit_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layer", ["lm_head", "model.embed_tokens"])
def test_a_copy_that_differs_replaces_the_weight_before_the_pair_is_added(
    bases, tmp_path, layer, tied
):
    source, dense = bases[tied]
    trained(load(dense), tmp_path / "adapter", target_modules=[layer.rpartition(".")[2]])
    key = f"base_model.model.{layer}.base_layer.weight"
    edit_tensors(tmp_path / "adapter", lambda tensors: tensors[key].mul_(1.25))
    adapter = f"--adapter={tmp_path / 'adapter'}"
    convert("merge", source, tmp_path / "merged", adapter, "--dtype", "float32")
    truth = logits(with_adapter(dense, tmp_path / "adapter", torch.float64))
    theirs = (logits(with_adapter(dense, tmp_path / "adapter", torch.float32)) - truth).abs().max()
    ours = (logits(load(tmp_path / "merged")) - truth).abs().max()
    assert ours <= 2 * theirs + 1e-6
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_that_equals_the_base_is_left_out(bases, tmp_path, dtype):
    from int4_lora.integration import open_checkpoint, read_adapter
    from int4_lora.integration.conversion.saved_copies import without_copies

    source, dense = bases[False]
    settings = {"target_modules": ["lm_head"], "modules_to_save": ["k_proj", "norm"]}
    trained(load(dense, dtype), tmp_path, steps=0, **settings)
    adapter = without_copies(read_adapter(tmp_path), open_checkpoint(source))
    assert not adapter.replacements
    assert f"{HEAD} is saved along and equals the base's: it is ignored" in adapter.notes
    assert len(adapter.notes) == 1 + 2 + 5  # lm_head, k_proj of two layers, norms
    key = f"base_model.model.{HEAD.replace('.weight', '.base_layer.weight')}"
    edit_tensors(tmp_path, lambda tensors: tensors[key][3, 4].neg_())
    adapter = without_copies(read_adapter(tmp_path), open_checkpoint(source))
    assert {*adapter.replacements} == {HEAD}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_int4_replaces_what_is_dense_and_requantises_what_is_packed(bases, tmp_path, tied):
    from int4_lora.integration import open_checkpoint
    from int4_lora.reference import dequantize

    source, dense = bases[tied]
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["norm", "k_proj", "lm_head"]}
    model = trained(load(dense), tmp_path / "adapter", **settings)
    convert("merge", source, tmp_path / "merged", f"--adapter={tmp_path / 'adapter'}", "--to=int4")
    before, after = tensors_of(source), tensors_of(tmp_path / "merged")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for name in (HEAD, "model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(after[name], saved[f"base_model.model.{name}"].bfloat16())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {name.rpartition(".")[0].rpartition(".")[2] for name in changed}
    assert parts == {"q_proj", "k_proj", "norm", "input_layernorm", "post_attention_layernorm"} | (
        set() if tied else {"lm_head"}
    )
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    errors = {one["module"]: one["relative_error"] for one in report["modules"]}
    merged = open_checkpoint(tmp_path / "merged")
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.k_proj"
        exact = model.state_dict()[f"base_model.model.{name}.modules_to_save.default.weight"]
        off = dequantize(merged.packed_weight(name), torch.float64) - exact
        assert errors[name] == pytest.approx(float(off.norm() / exact.double().norm()), rel=1e-9)
        assert errors[name] < 0.12
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    expected = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    assert config == expected


def test_a_head_that_int4_adds_is_named_as_not_quantised(bases, tmp_path):
    source, dense = bases[True]
    copied = shutil.copytree(source, tmp_path / "source")
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["re:.*visual.*"]
    (copied / "config.json").write_text(json.dumps(config))
    trained(load(dense), tmp_path / "adapter", **SETTINGS["head"])
    adapter = f"--adapter={tmp_path / 'adapter'}"
    convert("merge", copied, tmp_path / "merged", adapter, "--to=int4")
    merged = json.loads((tmp_path / "merged/config.json").read_text())
    assert merged["quantization_config"]["ignore"] == ["re:.*visual.*", "lm_head"]
    load(tmp_path / "merged")  # transformers takes lm_head for dense
    convert("merge", copied, tmp_path / "dense", adapter)
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


def test_inspect_names_what_is_replaced(bases, tmp_path):
    source, dense = bases[False]
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    for steps in (0, 2):
        trained(load(dense), tmp_path / str(steps), steps=steps, **settings)
        result = run("inspect", source, f"--adapter={tmp_path / str(steps)}", "--json")
        (report,) = json.loads(result.stdout)["adapters"]
        if steps:
            assert "weight is replaced, which only merge applies" in report["fault"]
            assert report["replaced"]["model.norm.weight"] is None
        else:
            assert report["fault"] is None
            assert report["replaced"] == {}
            assert "model.norm.weight is saved along and equals the base's" in str(report["notes"])


def test_a_tied_head_that_is_stored_too_changes_with_the_embeddings(bases, tmp_path):
    source, dense = bases[True]
    tensors = tensors_of(source)
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored/config.json").write_bytes((source / "config.json").read_bytes())
    save_file({**tensors, HEAD: tensors[EMBED].clone()}, tmp_path / "stored/model.safetensors")
    for name, stays in (("rows", True), ("head", False)):
        trained(load(dense), tmp_path / name, **SETTINGS[name])
        for base, target in ((source, f"{name}-one"), (tmp_path / "stored", f"{name}-two")):
            convert("merge", base, tmp_path / target, f"--adapter={tmp_path / name}")
        one, two = tensors_of(tmp_path / f"{name}-one"), tensors_of(tmp_path / f"{name}-two")
        assert torch.equal(two[HEAD], one[EMBED] if stays else one[HEAD])
        assert torch.equal(two[EMBED], one[EMBED])
        config = json.loads((tmp_path / f"{name}-two/config.json").read_text())
        assert config["tie_word_embeddings"] is stays


@pytest.mark.parametrize(
    ("name", "vocabulary", "said"),
    [
        (
            "head",
            88,
            "lm_head.weight: the adapter is for a vocabulary of 88 tokens, the base has 80",
        ),
        ("embeddings", 88, "the adapter is for a vocabulary of 88 tokens, the base has 80"),
        ("whole-head", 72, "the adapter is for a vocabulary of 72 tokens, the base has 80"),
        ("rows", 88, "the adapter replaces the row of token 85, the base has 80 tokens"),
    ],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_resized_vocabulary_is_refused_by_name(bases, tmp_path, name, vocabulary, said, tied):
    settings = dict(SETTINGS[name])
    if name == "rows":
        settings["trainable_token_indices"] = [7, 85]
    trained(llama(vocab_size=vocabulary), tmp_path / "adapter", steps=0, **settings)
    adapter = f"--adapter={tmp_path / 'adapter'}"
    message = refusal("merge", bases[tied][0], tmp_path / "merged", adapter)
    assert said in " ".join(message.split())


def test_what_cannot_be_replaced_is_refused(bases, tmp_path):
    source, dense = bases[False]
    for name in ("whole-head", "head", "rows"):
        trained(load(dense), tmp_path / name, **SETTINGS[name])
    target = tmp_path / "merged"
    whole, head, rows = (f"--adapter={tmp_path / name}" for name in ("whole-head", "head", "rows"))

    def said(*options):
        return " ".join(refusal("merge", source, target, *options).split())

    assert f"replaces {HEAD}, so that its weight must be 1, got 0.5" in said(f"{whole}=0.5")
    assert "lm_head: " in said(whole, head)
    assert "and one of the two replaces it" in said(whole, head)
    assert "and one of the two replaces it" in said(head, whole)
    assert "model.embed_tokens" in said(rows, rows)

    def score(tensors):
        tensors["base_model.model.score.weight"] = torch.ones(2, LLAMA["hidden_size"])

    def short(tensors):
        tensors["base_model.model.model.norm.weight"] = torch.ones(3)

    edit_tensors(tmp_path / "whole-head", short)
    edit_config(tmp_path / "whole-head", modules_to_save=["norm", "lm_head"])
    assert "model.norm.weight: a float tensor of [3] cannot replace BF16 [64]" in said(whole)
    edit_tensors(tmp_path / "rows", score)
    edit_config(tmp_path / "rows", modules_to_save=["score"])
    assert "score.weight is no module of" in said(rows)
