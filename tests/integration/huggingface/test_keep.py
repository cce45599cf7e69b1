import json
import shutil
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from int4_lora.integration import open_checkpoint
from int4_lora.integration.huggingface import Int4Linear, keep_packed, load_packed
from int4_lora.integration.huggingface.zero_points import packed_zero_points
from int4_lora.reference import quantize
from support.checkpoints import Q_PROJ, edit_config, edit_tensors
from support.tiny import shorten_scales
from support.trained import llama
from support.upstream_versions import IGNORES_G_IDX

pytestmark = pytest.mark.versions
TOKENS = torch.arange(1, 25).view(2, 12) * 7 % 512
KEPT = ("g128", "asym-g32", "actorder-g128", "actorder-weight-g128", "channel", "w8-g128")


def load(folder, dtype=torch.float32, **settings):
    with packed_zero_points():  # as load_packed
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings)


def kept_of(model):
    return [name for name, one in model.named_modules() if isinstance(one, Int4Linear)]


@pytest.mark.parametrize("variant", KEPT)
def test_logits_are_those_of_the_decompressed_model(square, decompressed, variant):
    if variant == "actorder-g128" and IGNORES_G_IDX:
        pytest.skip("compressed-tensors refuses actorder group since 0.19")
    model = keep_packed(load(square(variant)))
    assert len(kept_of(model)) == 14
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    with torch.no_grad():
        logits = model(TOKENS).logits
        expected = decompressed(variant)(TOKENS).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("variant", ["asym-g32", "actorder-g128", "channel"])
def test_save_pretrained_writes_the_checkpoint_again(square, tmp_path, variant):
    if variant == "actorder-g128" and IGNORES_G_IDX:
        pytest.skip("compressed-tensors refuses actorder group since 0.19")
    folder = square(variant)
    model = load_packed(folder)
    model.save_pretrained(tmp_path / "saved")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    old, new = open_checkpoint(folder), open_checkpoint(tmp_path / "saved")
    assert old.schemes == new.schemes
    again = load_packed(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(TOKENS[:1, :3]).logits, model(TOKENS[:1, :3]).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_loaders_dtype_does_not_reach_the_scales(square, dtype):
    """The loader casts the scales of compressed-tensors: float16 loses small ones."""
    folder = square("g128")
    state = keep_packed(load(folder, dtype)).state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".weight_" in name:
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name], tensor)
        else:
            assert state[name].dtype == dtype


def test_tensors_are_held_once_and_the_models_own_are_freed(square):
    import gc
    import weakref

    model = load(square("g128"))
    old = [weakref.ref(one) for name, one in model.named_parameters() if "weight_packed" in name]
    ids = {id(one) for one in model.parameters()}
    keep_packed(model)
    gc.collect()
    assert len(old) == 14
    assert not any(one() is not None for one in old)
    assert {id(one) for one in model.parameters()} < ids  # the rest is as it was
    held = sum(one.nbytes for one in model.buffers())
    stored = load_file(square("g128") / "model.safetensors")
    packed = sum(one.nbytes for name, one in stored.items() if ".weight_" in name)
    assert held <= 1.12 * packed + 1000  # and the rotary embedding's frequencies
    assert not model._forward_pre_hooks


def test_a_training_step_leaves_the_weights_packed(square, monkeypatch):
    """The first forward decompresses nothing, and no dense weight outlives the backward."""
    from int4_lora.integration.huggingface import dequantised

    model = keep_packed(load(square("g128")))
    tensors = {id(one): one.nbytes for one in [*model.parameters(), *model.buffers()]}
    monkeypatch.setattr(dequantised, "dense_weight", None)
    for _ in range(2):
        model(TOKENS, labels=TOKENS).loss.backward()
    assert {id(one): one.nbytes for one in [*model.parameters(), *model.buffers()]} == tensors
    names = {
        name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")
    }
    assert not names
    assert len(kept_of(model)) == 14


def test_a_second_call_changes_nothing(square):
    model = keep_packed(load(square("g128")))
    layers = [model.get_submodule(name) for name in kept_of(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keep_packed(model) is model
    assert [model.get_submodule(name) for name in kept_of(model)] == layers


@pytest.fixture
def interrupt(monkeypatch):
    """Return a function that keeps four layers of a model packed, as Ctrl-C in a notebook may."""
    keep = sys.modules["int4_lora.integration.huggingface.keep"]
    read, calls = keep._read, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return read(*arguments)

    def call(model):
        monkeypatch.setattr(keep, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            keep_packed(model)
        assert len(kept_of(model)) == 4
        return model

    return call


def test_a_call_that_was_interrupted_is_completed_by_another(square, interrupt):
    """Else the first forward would make the rest dense in silence."""
    whole, model = keep_packed(load(square("g128"))), interrupt(load(square("g128")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keep_packed(model) is model
    assert kept_of(model) == kept_of(whole)
    assert not model._forward_pre_hooks
    records = {id(model.get_submodule(name).record) for name in kept_of(model)}
    assert len(records) == 1
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, whole(TOKENS).logits)


def test_after_an_interruption_the_layers_that_stay_as_they_are_are_named(
    square, tmp_path, interrupt
):
    model = interrupt(load(mixed_with_nvfp4(square("g128"), tmp_path / "mixed")))
    with pytest.warns(UserWarning, match="stay as they are") as warned:
        keep_packed(model)
    (message,) = [str(one.message) for one in warned]
    assert message.splitlines()[1:] == [f"  {Q_PROJ}: its activations are quantised, too"]


@pytest.mark.parametrize(("step", "count"), [("register", 0), ("_remove_decompression", 14)])
def test_a_call_that_was_interrupted_around_its_layers_is_completed(
    square, monkeypatch, step, count
):
    model = load(square("g128"))
    keep, calls = sys.modules["int4_lora.integration.huggingface.keep"], []
    before = getattr(keep, step)

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return before(*arguments)

    monkeypatch.setattr(keep, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        keep_packed(model)
    assert len(kept_of(model)) == count
    keep_packed(model)
    assert len(calls) == 2
    assert len(kept_of(model)) == 14
    assert not model._forward_pre_hooks


def test_a_dense_model_is_refused_and_unchanged(square):
    model = load(square("g128"))
    with torch.no_grad():
        expected = model(TOKENS).logits
    with pytest.raises(ValueError, match=r"dense already \(14 of 14\): call keep_packed after"):
        keep_packed(model)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected)


def test_a_model_without_quantised_layers_is_refused():
    with pytest.raises(ValueError, match="no layer that compressed-tensors quantised"):
        keep_packed(llama())


def test_a_model_without_weights_is_refused(square):
    model = load(square("g128")).to("meta")
    with pytest.raises(
        ValueError,
        match=r"model\.layers\.\*\.self_attn\.q_proj \(2 modules\): .*"
        "meta device",
    ):
        keep_packed(model)


def test_another_checkpoint_is_refused_before_anything_changes(square, tmp_path):
    copied_model = shutil.copytree(square("g32"), tmp_path / "copied")
    edit_tensors(copied_model, weight_packed=lambda words: words ^ 1)
    model = load(square("g32"))
    with pytest.raises(ValueError, match=rf"{Q_PROJ}\.weight_packed differs from the model's"):
        keep_packed(model, checkpoint=copied_model)
    assert not kept_of(model)
    keep_packed(model)


def test_a_checkpoint_that_is_gone_is_named_with_the_way_out(square, tmp_path):
    folder = shutil.copytree(square("g128"), tmp_path / "moved")
    model = load(folder)
    folder.rename(tmp_path / "there")
    with pytest.raises(FileNotFoundError, match=r"moved.*keep_packed\(model, checkpoint=FOLDER\)"):
        keep_packed(model)
    assert not kept_of(model)
    keep_packed(model, checkpoint=tmp_path / "there")
    assert len(kept_of(model)) == 14
    model.config._name_or_path = ""
    model = load(tmp_path / "there")
    model.config._name_or_path = model.name_or_path = ""
    with pytest.raises(ValueError, match="does not say which checkpoint"):
        keep_packed(model)


def test_layers_of_another_format_are_left_and_named(square, tmp_path):
    """FP8 in one layer: transformers decompresses it in the first forward, ours stay packed."""
    folder = mixed_with_fp8(square("g128"), tmp_path / "mixed")
    model = load(folder)
    with pytest.warns(
        UserWarning, match=r"q_proj: its format is float-quantized \(float, 8 bits\)"
    ):
        keep_packed(model)
    assert len(kept_of(model)) == 13
    assert all(model.get_submodule(name).record.others for name in kept_of(model))
    expected = open_checkpoint(square("g128")).packed_weight(Q_PROJ)
    with torch.no_grad():
        model(TOKENS)
    weight = model.get_submodule(Q_PROJ).weight
    assert torch.equal(weight, torch.ones(expected.shape))
    assert len(kept_of(model)) == 13
    assert keep_packed(model) is model


def mixed(source, folder, name, scheme, stored=None, activations=None):
    """Return a copy of a checkpoint whose first q_proj has another format.

    Args:
        source: the checkpoint.
        folder: the copy.
        name: the format, with its group in ``config_groups``.
        scheme: the group's weights.
        stored: returns the stored tensors of a weight of a shape, by part of their names; None for
            those of the checkpoint.
        activations: the group's activations.
    """
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    if stored is not None:
        parts = {
            part: tensors.pop(f"{Q_PROJ}.weight_{part}") for part in ("packed", "scale", "shape")
        }
        others = stored(parts["shape"].tolist())
        tensors |= {f"{Q_PROJ}.{part}": tensor for part, tensor in others.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def change(_, quantization):
        groups = quantization["config_groups"]
        groups["group_0"]["targets"] = ["re:.*(k|v|o|gate|up|down)_proj", "re:.*layers.1.*q_proj"]
        groups["group_0"]["format"] = "pack-quantized"
        groups["other"] = {
            "targets": [Q_PROJ],
            "weights": scheme,
            "input_activations": activations,
            "format": name,
        }
        quantization["format"] = "mixed-precision"

    edit_config(folder, change)
    return folder


def mixed_with_fp8(source, folder):
    """Return a copy of a checkpoint whose first q_proj is FP8, every weight 1."""
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}

    def stored(shape):
        return {
            "weight": torch.ones(shape).to(torch.float8_e4m3fn),
            "weight_scale": torch.ones(shape[0], 1, dtype=torch.bfloat16),
        }

    return mixed(source, folder, "float-quantized", scheme, stored)


def test_load_packed_leaves_the_scales_of_other_formats_alone(square, tmp_path):
    """Transformers 5 leaves NVFP4's global scale in float32; 4.57 casts it with the model."""
    folder = mixed_with_nvfp4(square("g128"), tmp_path / "mixed")
    stock = load(folder, torch.bfloat16).get_submodule(Q_PROJ)
    with pytest.warns(UserWarning, match="q_proj: its activations are quantised, too"):
        ours = load_packed(folder, dtype=torch.bfloat16).get_submodule(Q_PROJ)
    expected = dict(stock.named_parameters())
    assert "weight_global_scale" in expected
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == expected[name].dtype, name
        assert torch.equal(parameter.float(), expected[name].float()), name


def mixed_with_nvfp4(source, folder):
    """Return a copy of a checkpoint whose first q_proj is W4A4 of NVFP4, every weight 0."""
    scheme = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group"}

    def stored(shape):
        rows, columns = shape
        return {
            "weight_packed": torch.zeros(rows, columns // 2, dtype=torch.uint8),
            "weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
            "weight_global_scale": torch.tensor([1234.5]),
            "input_global_scale": torch.tensor([1.0]),
        }

    weights, of_x = ({**scheme, "group_size": 16, "dynamic": one} for one in (False, "local"))
    return mixed(source, folder, "nvfp4-pack-quantized", weights, stored, activations=of_x)


def test_layers_with_quantised_activations_are_left_and_named(square, tmp_path):
    """W4A4: packed as W4A16 is, and computed otherwise."""
    scheme = {"num_bits": 4, "type": "int", "symmetric": True}
    folder = mixed(
        square("g128"),
        tmp_path / "mixed",
        "pack-quantized",
        {**scheme, "strategy": "group", "group_size": 128},
        activations={**scheme, "strategy": "token", "dynamic": True},
    )
    model = load(folder)
    with pytest.warns(UserWarning, match="q_proj: its activations are quantised, too"):
        keep_packed(model)
    assert Q_PROJ not in kept_of(model)
    assert len(kept_of(model)) == 13
    with torch.no_grad():
        expected = load(folder)(TOKENS).logits
        logits = model(TOKENS).logits
    assert (logits - expected).abs().max() < 1e-2 * expected.abs().max()  # of 16 activations' steps
    assert len(kept_of(model)) == 13


def test_a_layer_that_is_dense_already_is_left_and_named(square):
    from compressed_tensors.compressors import decompress_module

    model = load(square("g128"))
    decompress_module(model.get_submodule(Q_PROJ))
    weight = model.get_submodule(Q_PROJ).weight
    with pytest.warns(UserWarning, match="q_proj: its weight is dense already"):
        keep_packed(model)
    assert len(kept_of(model)) == 13
    assert model.get_submodule(Q_PROJ).weight is weight


def test_hooks_are_carried_over(square):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model = load(square("g128"))
    counting, seen = Counting(), []
    add_hook_to_module(model.get_submodule(Q_PROJ), counting)
    handle = model.get_submodule(Q_PROJ).register_forward_hook(lambda *_: seen.append(1))
    keep_packed(model)
    with torch.no_grad():
        model(TOKENS)
        handle.remove()
        model(TOKENS)
    assert counting.calls == 2
    assert seen == [1]
    assert isinstance(model.get_submodule(Q_PROJ), Int4Linear)


def test_a_tied_head_is_left_alone(tmp_path):
    from int4_lora.integration.demo import recipe
    from support.tiny import SQUARE, VARIANTS

    settings = {"num_bits": 4, "type": "int", "symmetric": True, **VARIANTS["g32"]}
    recipe.make_model(tmp_path / "tied", {**SQUARE, "tie_word_embeddings": True}, settings)
    model = load_packed(tmp_path / "tied")
    assert len(kept_of(model)) == 14
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "tied", tmp_path / "saved")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_biases_stay_the_parameters_that_they_were(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from int4_lora.integration.demo import recipe
    from support.tiny import SQUARE, VARIANTS

    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SQUARE, attention_bias=True)).to(torch.bfloat16)
    for name, one in dense.named_parameters():
        if name.endswith("bias"):
            one.data.normal_()
    settings = {"num_bits": 4, "type": "int", "symmetric": True, **VARIANTS["g32"]}
    recipe.save_quantised(dense, tmp_path / "biased", settings)
    shorten_scales(tmp_path / "biased")
    model = load(tmp_path / "biased")
    bias = model.get_submodule(Q_PROJ).bias
    with torch.no_grad():
        expected = load(tmp_path / "biased")(TOKENS).logits
        logits = keep_packed(model)(TOKENS).logits
    assert model.get_submodule(Q_PROJ).bias is bias
    assert bias.any()
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16", torch.float32])
def test_load_packed_leaves_in_float32_what_transformers_keeps_so(square, monkeypatch, dtype):
    from transformers import LlamaForCausalLM

    one, strict = "input_layernorm", "post_attention_layernorm"
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", [one])
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", [strict])
    model = load_packed(square("g128"), dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    wide = {torch.float16: (one, strict), torch.bfloat16: (strict,)}
    for name, parameter in model.named_parameters():
        kept = any(part in name for part in wide.get(wanted, ()))
        assert parameter.dtype == (torch.float32 if kept else wanted), name


def test_load_packed_takes_the_checkpoints_dtype_and_class(square, tmp_path):
    model = load_packed(square("g128"))
    assert model.dtype == torch.bfloat16
    assert type(model).__name__ == "LlamaForCausalLM"
    assert load_packed(square("g128"), dtype=torch.float32).dtype == torch.float32
    folder = shutil.copytree(square("g128"), tmp_path / "unknown")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Unknown"]}))
    assert type(load_packed(folder)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("rows", [520, 504])
def test_a_resized_head_is_dense_and_the_model_loads_again(square, tmp_path, rows):
    model = load_packed(with_int4_head(square("g128"), tmp_path / "model"))
    assert len(kept_of(model)) == 15
    model.resize_token_embeddings(512)  # as many rows as it has
    assert len(kept_of(model)) == 15
    with pytest.warns(UserWarning, match="lm_head was INT4; resized, it is dense, in torch.bfloat"):
        model.resize_token_embeddings(rows)
    assert len(kept_of(model)) == 14
    model.save_pretrained(tmp_path / "saved")
    again = load_packed(tmp_path / "saved")
    assert kept_of(again) == kept_of(model)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert len(again.lm_head.weight) == rows
    with torch.no_grad():
        assert torch.equal(again(TOKENS % rows).logits, model(TOKENS % rows).logits)


def with_int4_head(source, folder):
    """Return a copy of a checkpoint whose head is INT4, too."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    head = quantize(tensors.pop("lm_head.weight"), group_size=128, scale_dtype=torch.bfloat16)
    tensors["lm_head.weight_packed"], tensors["lm_head.weight_scale"] = head.packed, head.scale
    tensors["lm_head.weight_shape"] = torch.tensor(head.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, lambda _, quantization: quantization.update(ignore=[]))
    return folder


def test_load_packed_reads_the_checkpoint_in_a_subfolder(square, tmp_path):
    """The scales are those of the checkpoint that transformers loaded."""
    shutil.copytree(square("g32"), tmp_path / "root")
    shutil.copytree(square("g128"), tmp_path / "root" / "sub")
    model = load_packed(tmp_path / "root", subfolder="sub")
    assert_holds(model, square("g128"))


def test_load_packed_reads_the_checkpoint_in_the_cache_that_is_given(square, tmp_path):
    made, commit = tmp_path / "cache" / "models--made--tiny", "1" * 40
    shutil.copytree(square("g128"), made / "snapshots" / commit)
    shutil.copytree(square("g128"), made / "snapshots" / commit / "sub")
    (made / "refs").mkdir()
    (made / "refs" / "main").write_text(commit)
    place = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    for settings in (place, {**place, "subfolder": "sub"}):
        assert_holds(load_packed("made/tiny", **settings), square("g128"))


def assert_holds(model, folder):
    stored = open_checkpoint(folder)
    assert len(kept_of(model)) == 14
    for name in kept_of(model):
        held, expected = model.get_submodule(name).packed_weight(), stored.packed_weight(name)
        assert torch.equal(held.packed, expected.packed)
        assert torch.equal(held.scale, expected.scale)


def test_load_packed_returns_what_transformers_tells_of_the_loading(square):
    model, told = load_packed(square("g128"), output_loading_info=True)
    _, expected = load(square("g128"), output_loading_info=True)
    assert len(kept_of(model)) == 14
    assert told == expected
