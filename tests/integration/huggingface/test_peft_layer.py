"""PEFT on packed models does what PEFT does on the dense float32 model that they stand for."""

import copy
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from int4_lora.integration.huggingface import Int4Linear, keep_packed, load_packed
from int4_lora.integration.huggingface.peft_layer import BACKEND, Int4LoraLinear
from int4_lora.integration.huggingface.registration import register
from int4_lora.reference import PackedWeight
from support.tiny import SQUARE

pytestmark = pytest.mark.versions
TOKENS = torch.arange(1, 41).view(4, 10) * 7 % 512
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
CONFIGS = {
    "lora": PLAIN,
    "rslora": {**PLAIN, "use_rslora": True},
    "patterns": {
        **PLAIN,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 7},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
    },
    "dora": {**PLAIN, "use_dora": True, "target_modules": ["v_proj", "up_proj"]},
    "gaussian": {**PLAIN, "init_lora_weights": "gaussian"},
    "orthogonal": {**PLAIN, "init_lora_weights": "orthogonal", "target_modules": ["q_proj"]},
    "dense layers, too": {**PLAIN, "target_modules": ["q_proj", "lm_head", "embed_tokens"]},
}


def config(**settings):
    return LoraConfig(task_type="CAUSAL_LM", **settings)


def filled(model, seed=0):
    """Return a PEFT model in evaluation, all of whose B are random."""
    generator = torch.Generator().manual_seed(seed)
    for name, one in model.named_parameters():
        if ".lora_" in name and "magnitude" not in name:
            values = torch.randn(one.shape, generator=generator) * 0.05
            one.data.copy_(values)
    return model.eval()


@pytest.fixture
def packed(square):
    return keep_packed(AutoModelForCausalLM.from_pretrained(square("g128"), dtype=torch.float32))


@pytest.fixture
def dense(decompressed):
    return copy.deepcopy(decompressed("g128"))


def assert_close(actual, expected):
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def logits(model, **settings):
    with torch.no_grad():
        return model(TOKENS, **settings).logits


def layers_of(model):
    return [one for one in model.modules() if isinstance(one, Int4LoraLinear)]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=:UserWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_peft_on_the_dense_model(packed, dense, name):
    ours = filled(get_peft_model(packed, config(**CONFIGS[name])))
    theirs = filled(get_peft_model(dense, config(**CONFIGS[name])))
    assert layers_of(ours)
    assert not any(isinstance(one, Int4LoraLinear) for one in theirs.modules())
    assert_close(logits(ours), logits(theirs))
    gradients = []
    for model in (ours, theirs):
        model(TOKENS, labels=TOKENS).loss.backward()
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        gradients.append({name: one.grad for name, one in trained.items()})
    assert gradients[0].keys() == gradients[1].keys()
    assert not any(".base_layer." in name and "embed" not in name for name in gradients[0])
    for key, expected in gradients[1].items():
        assert (gradients[0][key] - expected).abs().max() <= 1e-4 * expected.abs().max(), key


def test_an_adapter_of_peft_is_saved_and_loaded(packed, dense, tmp_path):
    theirs = filled(get_peft_model(dense, config(**PLAIN)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(packed, tmp_path / "theirs").eval()
    assert len(layers_of(ours)) == 14
    assert_close(logits(ours), logits(theirs))
    ours.save_pretrained(tmp_path / "ours")
    saved = [load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[1])


def test_saving_an_adapter_converts_no_packed_words(packed, tmp_path, monkeypatch):
    """PEFT asks for the state_dict of the whole model, and takes the adapter's tensors."""
    stored = packed.state_dict()
    model = filled(get_peft_model(packed, config(**PLAIN)))
    layout = type(layers_of(model)[0].base_layer.prepared)
    convert, rows = layout.packed_rows, []

    def counted(self, start, stop):
        rows.append(stop - start)
        return convert(self, start, stop)

    monkeypatch.setattr(layout, "packed_rows", counted)
    model.save_pretrained(tmp_path / "adapter")
    assert sum(rows) <= 14 * layers_of(model)[0].base_layer.prepared.tile < 14 * 256
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 28
    state = model.state_dict()
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        inner = f"{module}.base_layer.{part}" if "_proj" in module else name
        assert torch.equal(state[f"base_model.model.{inner}"], tensor)
    model.load_state_dict(state)
    save_file(state, tmp_path / "whole.safetensors")
    saved = load_file(tmp_path / "whole.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())


def test_several_adapters_and_disabling_them(packed, dense):
    base = logits(dense)
    models = []
    for model in (packed, dense):
        model = get_peft_model(model, config(**PLAIN), adapter_name="x")
        model.add_adapter("y", config(**CONFIGS["patterns"]))
        models.append(filled(model))
    ours, theirs = models
    for name in ("x", "y"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        assert_close(logits(ours), logits(theirs))
        with ours.disable_adapter():
            assert_close(logits(ours), base)
    for model in models:
        model.add_weighted_adapter(["x", "y"], [0.5, 2.0], "z", combination_type="cat")
        model.set_adapter("z")
    assert_close(logits(ours), logits(theirs))
    ours.set_adapter("x")
    ours.delete_adapter("z")
    assert_close(logits(ours.unload()), base)
    assert not layers_of(ours.base_model.model)


def test_a_mixed_batch_is_one_call_a_layer(packed, dense, monkeypatch):
    models = []
    for model in (packed, dense):
        model = get_peft_model(model, config(**PLAIN), adapter_name="x")
        model.add_adapter("y", config(**CONFIGS["patterns"]))
        model.add_adapter("z", config(**CONFIGS["rslora"]))
        models.append(filled(model))
    ours, theirs = models
    calls = []
    stock = torch.nn.Linear.forward
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda self, x: calls.append(self) or stock(self, x)
    )
    names = ["y", "__base__", "z", "x"]
    mixed = logits(ours, adapter_names=names)
    assert not any(
        one is layer
        for one in calls
        for layer in ours.modules()
        if one is not ours.base_model.model.lm_head
    )
    monkeypatch.undo()
    assert_close(mixed, logits(theirs, adapter_names=names))
    for row, name in enumerate(names):
        for model in models:
            model.set_adapter("x" if name == "__base__" else name)
        with ours.disable_adapter() if name == "__base__" else torch.no_grad():
            assert_close(mixed[row], logits(ours)[row])
    layers_of(ours)[0].lora_B["x"].weight.data.mul_(-1)  # as PEFT's hotswap writes
    theirs.base_model.model.model.layers[0].self_attn.q_proj.lora_B["x"].weight.data.mul_(-1)
    assert_close(logits(ours, adapter_names=names), logits(theirs, adapter_names=names))
    made = ours.generate(
        input_ids=TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0, adapter_names=names
    )
    expected = theirs.generate(
        input_ids=TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0, adapter_names=names
    )
    assert torch.equal(made, expected)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
def test_a_mixed_batch_with_a_bias_of_b_is_left_to_peft(packed, dense):
    settings = config(**{**PLAIN, "target_modules": ["v_proj"]}, lora_bias=True)
    ours, theirs = (filled(get_peft_model(one, settings)) for one in (packed, dense))
    names = ["default", "__base__", "default", "default"]
    assert layers_of(ours)[0].lora_B["default"].bias.any()
    assert_close(logits(ours, adapter_names=names), logits(theirs, adapter_names=names))


def test_a_mixed_batch_in_training_is_left_to_peft(packed, dense):
    settings = {**PLAIN, "lora_dropout": 0.0}
    ours, theirs = (filled(get_peft_model(one, config(**settings))) for one in (packed, dense))
    names = ["default", "__base__", "default", "default"]
    for model in (ours, theirs):
        model(TOKENS, labels=TOKENS, adapter_names=names).loss.backward()
    grads = [
        {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        for model in (ours, theirs)
    ]
    assert grads[0].keys() == grads[1].keys()
    for name, expected in grads[1].items():
        assert (grads[0][name] - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("name", ["lora", "patterns", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unload_rounds_once(square, decompressed, name, dtype):
    """The exact sum in float64, rounded once: computed here from the adapter's matrices."""
    model = AutoModelForCausalLM.from_pretrained(square("g128"), dtype=dtype)
    model = filled(get_peft_model(keep_packed(model), config(**CONFIGS[name])))
    sums = {}
    for module, layer in model.base_model.model.named_modules():
        if isinstance(layer, Int4LoraLinear):
            own = decompressed("g128").get_submodule(module).weight.double()
            a, b = (one["default"].weight.double() for one in (layer.lora_A, layer.lora_B))
            total = own + layer.scaling["default"] * (b @ a)
            if name == "dora":
                magnitude = layer.lora_magnitude_vector["default"].weight.double()
                total = total * (magnitude / total.norm(dim=1))[:, None]
            sums[module] = total.detach()
    merged = model.merge_and_unload()
    for module, total in sums.items():
        linear = merged.get_submodule(module)
        assert type(linear) is torch.nn.Linear
        assert linear.weight.dtype == dtype
        assert not linear.weight.requires_grad
        if dtype == torch.float32 or name == "dora":
            off = (linear.weight.double() - total).abs()
            unit = torch.finfo(dtype).eps
            assert (off <= unit * total.abs() * (0.501 if name != "dora" else 0.6)).all(), module
        else:
            rounded = total.float().to(dtype)  # double rounding differs from one in 1 of 2^16
            assert (linear.weight != rounded).sum() <= 2


def test_a_merged_weight_is_not_rounded_to_float32_first():
    """1 + 2^-8 + 2^-30 is above the middle of two bfloat16 numbers; in float32 it is the middle."""
    register()
    words = torch.tensor([[0x99999999 - 2**32]], dtype=torch.int32)  # eight codes of 1
    weight = PackedWeight(words, torch.ones(1, 1, dtype=torch.bfloat16), shape=(1, 8))
    model = torch.nn.ModuleDict({"proj": Int4Linear(weight), "dense": torch.nn.Linear(1, 1)})
    model = get_peft_model(model, LoraConfig(r=1, lora_alpha=1, target_modules=["proj"]))
    (layer,) = layers_of(model)
    layer.lora_A["default"].weight.data.copy_(torch.eye(1, 8))
    layer.lora_B["default"].weight.data.fill_(2**-8 + 2**-30)
    merged = model.merge_and_unload()["proj"].weight
    assert merged.tolist() == [[1 + 2**-7, *[1.0] * 7]]


def test_a_merged_model_is_saved_so_that_it_loads_again(square, tmp_path):
    for name, count in (("patterns", 10), ("lora", 0)):
        model = get_peft_model(load_packed(square("g128")), config(**CONFIGS[name]))
        merged = filled(model).merge_and_unload()
        merged.save_pretrained(tmp_path / name)
        kind = load_packed if count else AutoModelForCausalLM.from_pretrained
        again = kind(tmp_path / name, dtype="auto")
        assert sum(isinstance(one, Int4Linear) for one in again.modules()) == count
        assert torch.equal(logits(again), logits(merged))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT up to 0.20 leaves it
def test_a_model_that_became_dense_is_not_quantised(square):
    """In transformers nobody may cast a quantised model, or train it without adapters."""
    model = load_packed(square("g128"))
    marks = ("hf_quantizer", "quantization_method")
    assert model.is_quantized
    assert get_peft_model(model, config(**PLAIN)).unload() is model
    for name, dense in (("patterns", False), ("lora", True)):
        model = filled(get_peft_model(model, config(**CONFIGS[name]))).merge_and_unload()
        assert model.is_quantized is not dense
        assert all(hasattr(model, mark) is not dense for mark in marks)
    assert not hasattr(model.config, "_is_quantized")
    assert model.half().dtype == torch.float16


def test_a_dense_model_with_other_quantised_layers_stays_quantised(square):
    model = load_packed(square("g128"))
    model.get_submodule("model.layers.0.mlp.up_proj").record.others = True
    merged = filled(get_peft_model(model, config(**PLAIN))).merge_and_unload()
    assert merged.is_quantized
    assert merged.config.quantization_config is not None


def test_merging_into_int4_is_refused_with_the_command(packed):
    model = filled(get_peft_model(packed, config(**PLAIN)))
    before = logits(model)
    with pytest.raises(RuntimeError, match="int4-lora merge MODEL RESULT --adapter ADAPTER --to"):
        model.merge_adapter()
    assert torch.equal(logits(model), before)
    assert not any(layer.merged for layer in layers_of(model))


def test_a_merged_weight_that_is_not_finite_is_refused_by_safe_merge(packed):
    model = filled(get_peft_model(packed, config(**PLAIN)))
    layers_of(model)[3].lora_B["default"].weight.data[5, 1] = float("inf")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize(
    ("way", "method"),
    [("pissa", "PiSSA"), ("pissa_niter_4", "PiSSA"), ("olora", "OLoRA"), ("loftq", "LoftQ")],
)
def test_an_initialisation_that_changes_the_base_is_refused(packed, way, method):
    before, settings = logits(packed), config(**PLAIN)
    settings.init_lora_weights = way  # LoraConfig itself needs scipy for LoftQ
    with pytest.raises(ValueError, match=rf"init_lora_weights = '{way}' changes .*\({method}\)"):
        get_peft_model(packed, settings)
    assert torch.equal(logits(packed), before)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["v_proj"], r"layers\.0\.self_attn\.v_proj is INT4"),
        (["lm_head", "mlp"], r"layers\.0\.mlp\.gate_proj is INT4"),
        (["layers.1.self_attn.q_proj"], r"layers\.1\.self_attn\.q_proj is INT4"),
    ],
)
def test_a_copy_of_an_int4_linear_is_not_trained(packed, names, named):
    """Its weight is frozen: without a refusal the copy would never change."""
    settings = {
        "target_modules": ["q_proj"],
        "modules_to_save": names,
        "task_type": "CAUSAL_LM",
    }
    for kind in (LoraConfig, peft.LoHaConfig):
        with pytest.raises(ValueError, match=rf"modules_to_save: .*{named}.* in target_modules"):
            get_peft_model(packed, kind(**settings))
    assert not layers_of(packed)
    model = get_peft_model(packed, LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match=named):
        model.add_adapter("second", LoraConfig(**settings))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=:UserWarning")
def test_a_copy_of_a_dense_layer_is_trained(packed):
    model = get_peft_model(packed, config(**PLAIN, modules_to_save=["lm_head", "norm"]))
    model(TOKENS, labels=TOKENS).loss.backward()
    copied = [one for name, one in model.named_parameters() if ".modules_to_save." in name]
    assert len(copied) == 6
    assert all(one.grad.any() for one in copied)


def test_the_weights_of_other_methods_of_peft_cannot_be_merged_in_silence(packed):
    """MiSS, like LoRA before its registration, adds to ``weight.data``."""
    model = get_peft_model(
        packed,
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    ).eval()
    for name, one in model.named_parameters():
        if "ia3_l" in name:
            one.data.fill_(2)
    with pytest.raises(RuntimeError, match="cannot be written to"):
        model.merge_adapter()


def test_the_registration_leaves_other_layers_and_configs_alone(packed, dense):
    settings = config(**PLAIN)
    get_peft_model(dense, settings)
    assert settings._custom_modules is None
    create = LoraModel._create_new_module
    keep_packed(packed)
    assert LoraModel._create_new_module is create
    assert "_custom_modules" not in settings.to_dict()


def test_fan_in_fan_out_is_set_to_false_as_for_any_linear(packed):
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(packed, config(**PLAIN, fan_in_fan_out=True))
    assert not any(layer.fan_in_fan_out for layer in layers_of(model))


def test_adapters_have_the_dtype_and_the_count_of_peft(packed, dense):
    ours, theirs = (get_peft_model(one, config(**PLAIN)) for one in (packed, dense))
    shapes = [
        {
            name: (one.shape, one.dtype, one.device)
            for name, one in model.named_parameters()
            if one.requires_grad
        }
        for model in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 28
    assert SQUARE["num_hidden_layers"] == 2


@pytest.mark.skipif(BACKEND is None, reason="QuantizationBackend is of PEFT 0.21")
def test_get_model_status_names_the_backend(packed):
    model = get_peft_model(packed, config(**PLAIN))
    status = model.get_model_status()
    assert status.quantization_backend == "int4_lora"
    assert status.merged_adapters == []


def test_a_peft_that_cannot_be_imported_is_a_warning(square, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "int4_lora.integration.huggingface.peft_registration", None)
    model = AutoModelForCausalLM.from_pretrained(square("g128"))
    with pytest.warns(UserWarning, match="PEFT is installed, but cannot be used here"):
        keep_packed(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep_packed(model)
