"""Models whose experts stay packed, and their adapters, against transformers and PEFT."""

import contextlib
import json
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from int4_lora.integration.huggingface import Int4Experts, Int4Linear, keep_packed, load_packed
from int4_lora.integration.huggingface.fused_experts import activation_of
from support.checkpoints import edit_config
from support.eager_graphs import without_inductor
from support.families import EXPERTS, FAMILIES, TEXT, make_family
from support.routing import Routing, group_scores, margins, routers_of
from support.trained import PEFT_WARNS, SAVED_BY_TODAYS_PEFT
from support.whole_models import assert_as_good, assert_exact, in_float64

pytestmark = [
    pytest.mark.versions,
    SAVED_BY_TODAYS_PEFT,
    *(pytest.mark.filterwarnings(f"ignore:{start}") for start in PEFT_WARNS),
]
TOKENS = torch.arange(1, 25).view(2, 12) * 7 % 90
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
ATTENTION = {"target_modules": ["q_proj", "q_b_proj", "o_proj"]}
ON_EXPERTS = {"target_modules": [], "target_parameters": [GATE_UP, DOWN]}
ADAPTERS = {"attention": ATTENTION, "experts": ON_EXPERTS}


@pytest.fixture(autouse=True)
def eager_graphs(monkeypatch):
    without_inductor(monkeypatch)
    for kind in (Int4Linear, Int4Experts):
        monkeypatch.setattr(kind, "forward", as_it_is(kind.forward))


def as_it_is(forward):
    def without_mode(self, *args, **kwargs):
        with torch._C.DisableTorchFunction():  # in_float64 changes what reads the bits of a float32
            return forward(self, *args, **kwargs)

    return without_mode


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that returns a family's folder; asymmetric if asked for."""
    folders = {}

    def of(name, zero_points=False):
        if (name, zero_points) not in folders:
            folder = folders[name, zero_points] = tmp_path_factory.mktemp("experts")
            make_family(folder, name, zero_points=zero_points)
        return folders[name, zero_points]

    return of


def dense_model(folder, name, dtype):
    model = getattr(transformers, FAMILIES[name][0]).from_pretrained(folder / "dense", dtype=dtype)
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()  # the rotary buffers, too


def with_adapter(model, seed=1, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **settings)
        return peft.get_peft_model(model, config)


def experts_of(model):
    return [one for one in model.modules() if isinstance(one, Int4Experts)]


@contextlib.contextmanager
def edited(folder):
    """Give the tensors of a checkpoint to change."""
    tensors = load_file(folder / "model.safetensors")
    yield tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def of_three(folder, name, settings):
    """Return a family in float64, in bfloat16 and packed, each with the same adapter or none."""
    models = [
        dense_model(folder, name, torch.float64),
        dense_model(folder, name, torch.bfloat16),
        load_packed(folder / "int4"),
    ]
    if settings is not None:
        models = [with_adapter(model, **settings).eval() for model in models]
        models[0].to(torch.float64)
        for model in models[1:]:
            peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(models[0]))
    return models


class WithItsRouting:
    """Make the routers of a model choose what those of another chose, with the same weights.

    Where a router's margin is below the error of low precision, another choice is no fault.
    """

    def __init__(self, truth):
        self.chosen = []
        self.hooks = [gate.register_forward_hook(self.keep) for gate in routers_of(truth)]

    def keep(self, gate, args, result):
        self.chosen.append(result[1:])

    def given_to(self, model):
        for hook in self.hooks:
            hook.remove()
        chosen = iter(self.chosen)

        def replace(gate, args, result):
            scores, index = next(chosen)
            return result[0], scores.to(result[1].dtype), index

        return [gate.register_forward_hook(replace) for gate in routers_of(model)]


@pytest.mark.parametrize(
    ("name", "zero_points"),
    [
        ("Qwen3-MoE", True),
        ("Mixtral", False),
        ("DeepSeek-V3", False),
        pytest.param("Qwen3-MoE", False, marks=pytest.mark.nightly),
        pytest.param("Mixtral", True, marks=pytest.mark.nightly),
        pytest.param("DeepSeek-V3", True, marks=pytest.mark.nightly),
    ],
)
def test_float64_is_the_definition(made, name, zero_points, tmp_path):
    """The base, and two adapters of PEFT: of attention and of experts."""
    folder = made(name, zero_points)
    packed = load_packed(folder / "int4", dtype=torch.float32)
    assert len(experts_of(packed)) == 1
    truth = dense_model(folder, name, torch.float64)
    base = in_float64(logits, truth)
    assert_exact(in_float64(logits, packed.to(torch.float64)), base)
    for kind, settings in ADAPTERS.items():
        trained = with_adapter(load_packed(folder / "int4", dtype=torch.float32), **settings)
        trained.save_pretrained(tmp_path / kind)
    ours = peft.PeftModel.from_pretrained(packed, tmp_path / "attention", adapter_name="attention")
    theirs = peft.PeftModel.from_pretrained(truth, tmp_path / "attention", adapter_name="attention")
    for model in (ours, theirs):
        model.load_adapter(tmp_path / "experts", adapter_name="experts")
        model.to(torch.float64).eval()
    for kind in ADAPTERS:
        ours.set_adapter(kind)
        theirs.set_adapter(kind)
        expected = in_float64(logits, theirs)
        assert (expected - base).abs().max() > 1e-2  # the adapter shows
        assert_exact(in_float64(logits, ours), expected)
        with ours.disable_adapter():
            assert_exact(in_float64(logits, ours), base)


@pytest.mark.parametrize("name", EXPERTS)
def test_bfloat16_with_the_routing_of_float64(made, name):
    models = of_three(made(name), name, ON_EXPERTS)
    routing = WithItsRouting(models[0])
    truth = in_float64(logits, models[0])
    results = []
    for model in models[1:]:
        routing.given_to(model)
        results.append(logits(model))
    theirs, ours = results
    assert_as_good(ours, theirs, truth)


def run_end_to_end(models):
    """Return the logits ``[tokens, vocabulary]`` and the routing of each model, truth first."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, TEXT["vocab_size"], (8, 32), generator=generator)
    results, routings = [], []
    for number, model in enumerate(models):
        routings.append(Routing(model))
        with torch.no_grad():
            run = model if number else lambda ids: in_float64(models[0], ids)
            results.append(run(tokens).logits.flatten(0, 1))
    return results, routings


def clear_tokens(truth, theirs):
    """Return which tokens no error of bfloat16 gives other experts: bool ``[tokens]``.

    Two scores change places only if their errors add up to the margin. Each of ours may err by
    twice what transformers errs at most.
    """
    error = (theirs.scores - truth.scores).abs().max()
    return margins(truth.scores, truth.k) > 2 * 2 * error


@pytest.mark.parametrize("kind", ["base", *ADAPTERS])
@pytest.mark.parametrize("name", EXPERTS)
def test_bfloat16_end_to_end(made, name, kind, record_property):
    """Each model routes its tokens itself.

    The experts are those of the last layer: a token that is given other experts changes no other
    token's logits.
    """
    (truth, theirs, ours), routings = run_end_to_end(of_three(made(name), name, ADAPTERS.get(kind)))
    clear = clear_tokens(*routings[:2])
    record_property("low_margin_tokens", int((~clear).sum()))
    assert clear.sum() >= 0.75 * len(clear), f"{(~clear).sum()} of {len(clear)} tokens apart"
    chosen = [routing.experts[clear] for routing in routings]
    assert torch.equal(chosen[1], chosen[0])
    assert torch.equal(chosen[2], chosen[0])
    assert_as_good(ours[clear], theirs[clear], truth[clear])
    assert ours.isfinite().all()


@pytest.mark.parametrize("name", EXPERTS)
def test_end_to_end_dropped_adapters_of_experts_are_seen(made, name):
    models = of_three(made(name), name, ON_EXPERTS)
    with models[2].disable_adapter():
        (truth, theirs, ours), routings = run_end_to_end(models)
    clear = clear_tokens(*routings[:2])
    assert torch.equal(routings[2].experts[clear], routings[0].experts[clear])
    with pytest.raises(AssertionError):
        assert_as_good(ours[clear], theirs[clear], truth[clear])


def test_margins_of_routers():
    scores = torch.tensor([[3.0, 1.0, 2.5, 0.0], [1.0, 1.0, 1.0, 4.0]])
    assert margins(scores, 2).tolist() == [1.5, 0.0]
    assert margins(scores, 1).tolist() == [0.5, 3.0]
    # sigmoid(0) = 1/2: the biases decide; the worst of three experts of a group does not count
    bias = torch.tensor([0.25, 0.5, -9.0, 0.125, 0.0, 0.0])
    assert group_scores(torch.zeros(1, 6), bias, 2).tolist() == [[1.75, 1.125]]


@pytest.mark.parametrize("name", EXPERTS)
def test_gradients_of_adapters_are_pefts(made, name):
    folder = made(name, zero_points=True)
    gradients = []
    truth = dense_model(folder, name, torch.float64)
    for model in (truth, load_packed(folder / "int4", dtype=torch.float32)):
        adapted = with_adapter(model, **ON_EXPERTS)
        adapted.to(torch.float64) if model is truth else None

        def loss_of(adapted=adapted):
            return adapted(input_ids=TOKENS, labels=TOKENS).loss

        loss = in_float64(loss_of) if model is truth else loss_of()
        loss.backward()
        gradients.append(
            {key: one.grad for key, one in adapted.named_parameters() if one.grad is not None}
        )
    theirs, ours = gradients
    assert len(theirs) == 4
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert expected.any()
        assert (ours[key].double() - expected).norm() <= 1e-5 * expected.norm(), key


def test_a_step_of_training_keeps_nothing_of_all_experts(made):
    """Saved for the backward: rows of activations, and adapters; no dense weight of all experts."""
    folder = made("Qwen3-MoE")
    model = with_adapter(load_packed(folder / "int4", dtype=torch.float32), **ON_EXPERTS)
    experts = experts_of(model)[0]
    whole = experts.num_experts * 2 * experts.intermediate_dim * experts.hidden_dim
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=TOKENS[:1, :4], labels=TOKENS[:1, :4]).loss.backward()
    assert saved
    assert max(saved) < whole / 2


def test_an_adapter_for_each_row(made):
    folder = made("Qwen3-MoE")
    model = load_packed(folder / "int4", dtype=torch.float32)
    model = with_adapter(model, **ON_EXPERTS).eval()
    config = peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, **ON_EXPERTS)
    model.add_adapter("second", config)
    tokens = TOKENS[:1].repeat(3, 1)
    with torch.no_grad():
        mixed = model(tokens, adapter_names=["second", "__base__", "default"]).logits
        with model.disable_adapter():
            rows = [model(tokens[:1]).logits[0]]
        for adapter in ("default", "second"):
            model.set_adapter(adapter)
            rows.append(model(tokens[:1]).logits[0])
    for row, expected in zip(mixed, (rows[2], rows[0], rows[1]), strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)
    assert (rows[1] - rows[2]).abs().max() > 1e-3


def test_active_adapters_are_added(made):
    folder = made("Qwen3-MoE")
    dense = dense_model(folder, "Qwen3-MoE", torch.float32)
    packed = load_packed(folder / "int4", dtype=torch.float32)
    models = [with_adapter(model, **ON_EXPERTS) for model in (dense, packed)]
    config = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, **ON_EXPERTS}
    for model in models:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            model.add_adapter("second", peft.LoraConfig(**config))
        model.base_model.set_adapter(["default", "second"])
        model.eval()
    theirs, ours = (logits(model) for model in models)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_few_tokens_read_the_pairs_of_their_experts_only(made):
    folder = made("Qwen3-MoE")
    model = with_adapter(load_packed(folder / "int4", dtype=torch.float32), **ON_EXPERTS).eval()
    experts = experts_of(model)[0]
    wrapper = next(one for one in model.modules() if type(one).__name__ == "ParamWrapper")
    ids = torch.tensor([[1, 3]])
    x = torch.randn(1, experts.hidden_dim)
    with torch.no_grad():
        before = wrapper(x, ids, torch.ones(1, 2))
        for layer in (wrapper, wrapper.base_layer):
            a = layer.lora_A["default"].weight.view(experts.num_experts, 3, -1)
            a[[0, 2]] = torch.nan
        assert torch.equal(wrapper(x, ids, torch.ones(1, 2)), before)
        assert not torch.equal(experts(x, ids, torch.ones(1, 2)), before)


@pytest.mark.parametrize("name", EXPERTS)
def test_keep_packed_after_from_pretrained(made, name):
    """The experts that transformers has made dense are read from the checkpoint again."""
    folder = made(name)
    kind = getattr(transformers, FAMILIES[name][0])
    model = kind.from_pretrained(folder / "int4", dtype=torch.bfloat16)
    assert keep_packed(keep_packed(model)) is model
    expected = load_packed(folder / "int4")
    assert len(experts_of(model)) == len(experts_of(expected)) == 1
    assert torch.equal(logits(model), logits(expected))
    assert not any(one.ndim == 3 for one in model.parameters())


def test_keep_packed_saves_the_checkpoint_again(made, tmp_path):
    folder = made("Mixtral")
    model = keep_packed(transformers.MixtralForCausalLM.from_pretrained(folder / "int4"))
    model.save_pretrained(tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    expected = load_file(folder / "int4" / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_experts_of_another_checkpoint_are_refused(made, tmp_path):
    folder = made("Qwen3-MoE")
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(folder / "int4")

    other = shutil.copytree(folder / "int4", tmp_path / "other")
    with edited(other) as tensors:
        key = "model.layers.0.mlp.experts.3.down_proj.weight_scale"
        tensors[key] = tensors[key] * 2
    with pytest.raises(ValueError, match=r"expert 3 differs from the model's .*experts\.down_proj"):
        keep_packed(model, other)
    assert not experts_of(model)
    assert not any(isinstance(one, Int4Linear) for one in model.modules())


def test_no_experts_are_dense_while_a_model_is_loaded(made, monkeypatch):
    """Also: transformers reports neither missing nor unexpected tensors."""
    from transformers.integrations import compressed_tensors

    def refuse(*args, **kwargs):
        raise AssertionError("experts were dequantised")

    monkeypatch.setattr(compressed_tensors.DecompressExperts, "convert", refuse)
    for name in EXPERTS:
        folder = made(name)
        _, told = load_packed(folder / "int4", output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]


def test_a_model_of_which_only_experts_are_quantised(made, tmp_path):
    folder = shutil.copytree(made("Qwen3-MoE") / "int4", tmp_path / "int4")
    dense = load_file(made("Qwen3-MoE") / "dense" / "model.safetensors")
    with edited(folder) as tensors:
        for key in [key for key in tensors if "self_attn" in key and ".weight_" in key]:
            del tensors[key]
        tensors |= {key: tensor for key, tensor in dense.items() if "self_attn" in key}
    edit_config(folder, lambda _, quantization: quantization["ignore"].append("re:.*self_attn.*"))
    model = load_packed(folder)
    assert len(experts_of(model)) == 1
    assert not any(isinstance(one, Int4Linear) for one in model.modules())
    theirs = logits(dense_model(made("Qwen3-MoE"), "Qwen3-MoE", torch.bfloat16))
    truth = in_float64(logits, dense_model(made("Qwen3-MoE"), "Qwen3-MoE", torch.float64))
    assert_as_good(logits(model), theirs, truth)


def test_experts_that_are_partly_dense_are_named(made, tmp_path):
    folder = shutil.copytree(made("Qwen3-MoE") / "int4", tmp_path / "int4")
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(folder)
    with edited(folder) as tensors:
        for part in ("packed", "scale", "shape"):
            del tensors[f"model.layers.0.mlp.experts.2.up_proj.weight_{part}"]
    with pytest.warns(UserWarning, match="expert 2 of 4 has no quantised up_proj"):
        keep_packed(model)
    assert not experts_of(model)


class TestClassesOfExperts:
    """Which classes of transformers compute ``int4_moe``."""

    @staticmethod
    def experts(family, config, activation="silu"):
        module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["x"])
        name = next(one for one in dir(module) if one.endswith("Experts"))
        settings = {"hidden_size": 8, "intermediate_size": 4, "moe_intermediate_size": 4}
        settings["hidden_act"] = activation
        made = getattr(transformers, config)(**settings)
        with torch.device("meta"):
            return getattr(module, name)(made)

    @pytest.mark.parametrize(
        ("family", "config"),
        [
            ("qwen3_moe", "Qwen3MoeConfig"),
            ("mixtral", "MixtralConfig"),
            ("deepseek_v3", "DeepseekV3Config"),
            ("glm4_moe", "Glm4MoeConfig"),
        ],
    )
    def test_they_do(self, family, config):
        assert activation_of(self.experts(family, config)) == "silu"

    def test_gelu_by_tanh(self):
        module = self.experts("qwen3_moe", "Qwen3MoeConfig", "gelu_pytorch_tanh")
        assert activation_of(module) == "gelu_tanh"

    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    def test_another_activation_does_not(self, activation):
        module = self.experts("qwen3_moe", "Qwen3MoeConfig", activation)
        assert activation_of(module) is None

    def test_gpt_oss_does_not(self):
        """Its gate is clamped and interleaved with up, and its layers have biases."""
        assert activation_of(self.experts("gpt_oss", "GptOssConfig")) is None

    def test_a_clamped_gate_does_not(self):
        module = self.experts("qwen3_moe", "Qwen3MoeConfig")
        module.act_fn = nn.Sequential(nn.Hardtanh(-1e9, 7.0), module.act_fn)
        assert activation_of(module) is None

    def test_a_module_that_is_no_experts_does_not(self):
        assert activation_of(nn.Linear(2, 2)) is None


def test_modules_to_save_with_experts_are_refused(made):
    model = load_packed(made("Qwen3-MoE") / "int4")
    with pytest.raises(ValueError, match=r"mlp\.experts is INT4.*target_parameters"):
        with_adapter(model, modules_to_save=["experts"], **ATTENTION)


def test_merging_into_int4_is_refused(made):
    model = with_adapter(load_packed(made("Qwen3-MoE") / "int4"), **ON_EXPERTS)
    with pytest.raises(RuntimeError, match="int4-lora merge MODEL RESULT"):
        model.merge_adapter()


def test_merging_rounds_each_weight_once(made, tmp_path):
    folder = made("Qwen3-MoE")
    model = with_adapter(load_packed(folder / "int4"), **ON_EXPERTS)
    dense = with_adapter(dense_model(folder, "Qwen3-MoE", torch.float64), **ON_EXPERTS)
    peft.set_peft_model_state_dict(dense, peft.get_peft_model_state_dict(model))
    exact = dense.to(torch.float64).merge_and_unload().model.layers[0].mlp.experts
    merged = model.merge_and_unload().model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        truth, found = getattr(exact, name), getattr(merged, name)
        assert found.dtype == torch.bfloat16
        assert ((found.double() - truth).abs() <= 2**-8 * truth.abs() * (1 + 1e-6)).all()


def test_unloading_gives_the_packed_base_back(made):
    folder = made("Qwen3-MoE")
    model = load_packed(folder / "int4")
    before = logits(model)
    base = with_adapter(model, **ON_EXPERTS).unload()
    assert len(experts_of(base)) == 1
    assert torch.equal(logits(base), before)


def test_the_saved_config_calls_merged_experts_dense(made, tmp_path):
    folder = made("Qwen3-MoE")
    model = with_adapter(load_packed(folder / "int4"), **ON_EXPERTS).merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "model.layers.0.mlp.experts.0.gate_proj" in config["quantization_config"]["ignore"]
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found["model.layers.0.mlp.experts.0.gate_proj.weight"].dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_packed(tmp_path / "merged")
    assert torch.equal(logits(again), logits(model))


def test_generate(made):
    model = load_packed(made("Qwen3-MoE") / "int4", dtype=torch.float32)
    model = with_adapter(model, **ON_EXPERTS).eval()
    made_tokens = model.generate(TOKENS, max_new_tokens=3, do_sample=False)
    tokens = TOKENS
    for _ in range(3):
        with torch.no_grad():
            step = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, step], dim=1)
    assert torch.equal(made_tokens, tokens)
