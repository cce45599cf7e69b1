"""The ways to run and to train a model of transformers, on a packed model.

The dense model is made of the weights that compressed-tensors decompresses.
"""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from int4_lora.integration import open_checkpoint
from int4_lora.integration.demo.models import dense_model
from int4_lora.integration.huggingface import Int4Linear, load_packed
from support.whole_models import assert_as_good, assert_exact, in_float64

pytestmark = pytest.mark.versions
TOKENS = torch.arange(1, 41).view(4, 10) * 7 % 512
PADDED = torch.ones(4, 10, dtype=torch.int64)
PADDED[0, :4] = PADDED[2, :1] = 0  # on the left, as generate expects
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def folder(square):
    return square("g128")


@pytest.fixture(scope="module")
def dense_of(folder):
    """Return a function that returns the dense model in a dtype."""
    made = {}

    def model_of(dtype):
        if dtype not in made:
            made[dtype] = dense_model(open_checkpoint(folder), dtype)
        return made[dtype]

    return model_of


@pytest.fixture
def packed(folder):
    return load_packed(folder, dtype=torch.float32)


def logits(model, **settings):
    with torch.no_grad():
        return model(TOKENS, **settings).logits


def layers_of(model):
    return [one for one in model.modules() if isinstance(one, Int4Linear)]


def with_adapters(model, **settings):
    """Return a PEFT model in training, with the same random adapters in each call."""
    torch.manual_seed(0)
    settings = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).train()


def gradients(model, tokens=TOKENS):
    """Return the gradients of a step, by name, and remove them."""
    loss_of(model, tokens).backward()
    return taken(model)


def loss_of(model, tokens=TOKENS):
    return model(tokens, labels=tokens).loss


def taken(model):
    found = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_generate_with_padding(folder, dense_of, dtype, cache):
    model = load_packed(folder, dtype=dtype)
    model.generation_config.eos_token_id = None  # no row ends early
    made = model.generate(
        TOKENS,
        attention_mask=PADDED,
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert made.sequences.shape == (4, 14)
    mask = torch.cat([PADDED, torch.ones(4, 4, dtype=torch.int64)], 1)
    rows = {
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }
    with torch.no_grad():
        theirs = dense_of(dtype)(made.sequences, **rows).logits
        truth = in_float64(dense_of(torch.float64), made.sequences, **rows).logits
    assert_as_good(torch.stack(made.logits, 1).to(dtype), theirs[:, 9:-1], truth[:, 9:-1])
    if dtype == torch.float32:
        assert torch.equal(made.sequences[:, 10:], truth[:, 9:-1].argmax(-1))


def test_the_rule_for_whole_models_rejects_wrong_logits(dense_of):
    theirs, truth = logits(dense_of(torch.bfloat16)), in_float64(logits, dense_of(torch.float64))
    assert_as_good(theirs, theirs, truth)
    for wrong in (theirs * 1.02, theirs.roll(1, 0), theirs + 0.02, theirs * float("nan")):
        with pytest.raises(AssertionError):
            assert_as_good(wrong, theirs, truth)
    with pytest.raises(AssertionError):
        assert_as_good(theirs.float(), theirs, truth)
    assert_exact(truth, truth)
    with pytest.raises(AssertionError):
        assert_exact(truth * (1 + 1e-8), truth)


def test_float64(folder, dense_of, monkeypatch):
    forward = Int4Linear.forward

    def as_it_is(self, x):
        with torch._C.DisableTorchFunction():  # in_float64 changes what reads the bits of a float32
            return forward(self, x)

    monkeypatch.setattr(Int4Linear, "forward", as_it_is)
    model = load_packed(folder, dtype=torch.float64).to(torch.float64)  # the rotary buffers, too
    assert_exact(in_float64(logits, model), in_float64(logits, dense_of(torch.float64)))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_cast_model(packed, dense_of, dtype):
    """The cast rounds the rotary embedding's frequencies, too."""
    dense = copy.deepcopy(dense_of(torch.float32))
    ours, theirs = logits(packed.to(dtype)), logits(dense.to(dtype))
    assert_as_good(ours, theirs, in_float64(logits, dense_of(torch.float64)))
    with pytest.raises(ValueError, match="not supported for quantized model"):
        packed.half()  # transformers allows .to(dtype) only


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_autocast(packed, dense_of, dtype):
    with torch.autocast("cpu", dtype):
        ours, theirs = logits(packed), logits(dense_of(torch.float32))
    assert_as_good(ours, theirs, in_float64(logits, dense_of(torch.float64)))


def test_inference_mode_and_then_training(packed):
    expected = logits(packed)
    copied = copy.deepcopy(packed)
    with torch.inference_mode():
        assert torch.equal(packed(TOKENS).logits, expected)
        assert torch.equal(packed.to("cpu")(TOKENS).logits, expected)
    ours, theirs = gradients(with_adapters(packed)), gradients(with_adapters(copied))
    assert all(torch.equal(ours[name], one) for name, one in theirs.items())


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto"])
def test_device_maps_that_offload_nothing(folder, packed, device_map):
    model = load_packed(folder, dtype=torch.float32, device_map=device_map)
    assert torch.equal(logits(model), logits(packed))


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": lambda model: through_a_file(model, weights_only=False),
}


def through_a_file(saved, **settings):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, **settings)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_a_model_of_its_own(folder, packed, tmp_path, way):
    copied = COPIES[way](packed)
    assert torch.equal(logits(copied), logits(packed))
    held = {one.data_ptr() for layer in layers_of(packed) for one in layer.buffers()}
    assert not held & {one.data_ptr() for layer in layers_of(copied) for one in layer.buffers()}
    merged = with_adapters(copied).eval().merge_and_unload()
    assert not merged.is_quantized
    assert len(layers_of(packed)) == 14
    assert packed.is_quantized
    packed.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert_files_hold(load_file(folder / "model.safetensors"), tmp_path / "saved")


def assert_files_hold(expected, folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_a_state_dict_through_a_file(folder, packed):
    state = through_a_file(packed.state_dict(), weights_only=True)
    other = load_packed(folder, dtype=torch.float32)
    for layer in layers_of(other):
        for buffer in layer.buffers():
            buffer.zero_()
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(packed))


def test_shards(folder, tmp_path):
    model = load_packed(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert_files_hold(load_file(folder / "model.safetensors"), tmp_path / "shards")
    assert torch.equal(logits(load_packed(tmp_path / "shards")), logits(model))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # from 5.23 on
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(packed, reentrant):
    model = with_adapters(packed, lora_dropout=0.2)
    torch.manual_seed(1)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls = []
    layers_of(model)[0].register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    actual = gradients(model)
    assert len(calls) == 2  # the forward, and again in the backward
    assert len(expected) == 28
    for name, one in expected.items():
        assert one.any(), name
        assert torch.equal(actual[name], one), name


def test_accumulated_gradients_are_the_sum(packed):
    model = with_adapters(packed)
    parts = [gradients(model, part) for part in TOKENS.chunk(2)]
    for part in TOKENS.chunk(2):
        loss_of(model, part).backward()
    for name, one in taken(model).items():
        assert torch.equal(one, parts[0][name] + parts[1][name]), name


TRAININGS = {
    "autocast to bfloat16": (torch.bfloat16, 1.0),
    "autocast to float16, scaled": (torch.float16, 2.0**10),
}


@pytest.mark.parametrize("way", TRAININGS)
def test_gradients_under_autocast(packed, dense_of, way):
    """Of float32 adapters; float16 needs the loss scaled, as GradScaler does."""
    dtype, scale = TRAININGS[way]
    models = [with_adapters(copy.deepcopy(dense_of(one))) for one in (torch.float32, torch.float64)]
    models[1].to(torch.float64)
    found = []
    for model in (with_adapters(packed), *models):
        exact = model is models[1]
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad])
        if exact:
            loss = in_float64(loss_of, model)
        else:
            with torch.autocast("cpu", dtype):
                loss = loss_of(model)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found.append(taken(model))
    ours, theirs, truth = found
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, exact in truth.items():
        assert_as_good(ours[name], theirs[name], exact, dtype)


def test_a_step_whose_gradients_overflow_is_skipped(packed):
    model = with_adapters(packed)
    trained = [one for one in model.parameters() if one.requires_grad]
    before = [one.detach().clone() for one in trained]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(model)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**126
    assert all(torch.equal(one, old) for one, old in zip(trained, before, strict=True))


SHAPES = {  # the lengths of further calls
    "eager": ("eager", ()),
    "eager, other lengths": ("eager", (3, 5, 6, 7, 8, 9)),
    "inductor": ("inductor", ()),
}
SLOW = {name: [] if name == "eager" else [pytest.mark.nightly] for name in SHAPES}


@pytest.fixture
def graphs_made():
    """Return a function that returns how many graphs Dynamo has made in this test."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo
@pytest.mark.parametrize("case", [pytest.param(one, marks=SLOW[one]) for one in SHAPES])
def test_a_compiled_model_is_compiled_once(packed, monkeypatch, graphs_made, case):
    from int4_lora.integration.huggingface import dequantised

    monkeypatch.setattr(dequantised, "dense_weight", None)  # no weight may be made dense
    backend, lengths = SHAPES[case]
    packed.model.layers = packed.model.layers[:1]  # tracing takes a second for each layer
    expected = logits(packed)
    compiled = torch.compile(packed, backend=backend)
    counts = []
    for _ in range(3):
        assert (logits(compiled) - expected).abs().max() <= 1e-5 * expected.abs().max()
        counts.append(graphs_made())
    first = counts[0]
    assert first > 0
    assert counts == [first] * 3
    for length in lengths:
        with torch.no_grad():
            compiled(TOKENS[:, :length])
    assert graphs_made() <= 3 * first
    assert logits(compiled).shape == expected.shape


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo
def test_a_compiled_model_trains(packed, graphs_made):
    packed.model.layers = packed.model.layers[:1]
    model = with_adapters(packed)
    expected = gradients(model)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        loss_of(compiled).backward()
        actual = taken(model)
        for name, one in expected.items():
            assert (actual[name] - one).abs().max() <= 1e-4 * one.abs().max(), name
