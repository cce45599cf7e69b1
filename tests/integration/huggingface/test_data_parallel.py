"""What DistributedDataParallel sends of a packed model, and that it trains it."""

import pickle

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from int4_lora.integration.huggingface import Int4Linear, load_packed
from int4_lora.integration.huggingface.data_parallel import register
from support.data_parallel import in_two_processes

pytestmark = pytest.mark.versions
TOKENS = torch.arange(1, 41).view(4, 10) * 7 % 512
SETTINGS = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_adapters(folder):
    torch.manual_seed(0)
    model = load_packed(folder, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(**SETTINGS, init_lora_weights=False))


class Wrapped(nn.Module):
    """A module of the user's around a model."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


LEVELS = {
    "PEFT": lambda model: model,
    "a part of the model": lambda model: model.base_model.model.model,
    "a module around it": Wrapped,
    "torch.compile around it": torch.compile,
    "a list": lambda model: nn.Sequential(nn.Identity(), model),
}


@pytest.mark.parametrize("level", LEVELS)
def test_no_packed_tensor_is_sent(square, process_group, monkeypatch, level):
    model = LEVELS[level](with_adapters(square("g128")))
    packed = {id(one) for layer in layers_of(model) for one in layer.buffers()}
    assert len(packed) == 28
    sent = []
    monkeypatch.setattr(
        dist, "_broadcast_coalesced", lambda _, tensors, *rest: sent.extend(map(id, tensors))
    )
    parallel = DistributedDataParallel(model)
    buffers = {id(one) for one in parallel.modules_buffers}
    assert not packed & buffers
    assert not any(".int4_" in name for name in parallel.named_module_buffers)
    assert all(one._ddp_ignored for layer in layers_of(model) for one in layer.buffers())
    if level == "PEFT":
        parallel(TOKENS, labels=TOKENS).loss.backward()
        assert sent
        assert not packed & set(sent)
        rotary = sum(one.nbytes for one in model.buffers() if id(one) not in packed)
        assert sum(one.nbytes for one in parallel.modules_buffers) == rotary < 1000


def layers_of(model):
    return [one for one in model.modules() if isinstance(one, Int4Linear)]


def test_names_that_a_script_ignores_stay_ignored(square, process_group):
    model = with_adapters(square("g128"))
    name = next(name for name, one in model.named_parameters() if one.requires_grad)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [name])
    parallel = DistributedDataParallel(model)
    assert name in parallel.parameters_to_ignore
    assert not any(".int4_" in name for name in parallel.named_module_buffers)


def test_other_models_are_as_they_were(process_group):
    model = nn.Sequential(nn.BatchNorm1d(4))
    register()
    parallel = DistributedDataParallel(model)
    assert len(parallel.modules_buffers) == 3
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


def test_a_pickled_model_registers_in_the_process_that_loads_it(square, monkeypatch):
    from peft.tuners.lora import LoraModel

    saved = pickle.dumps(load_packed(square("g128")))
    wrapped = {}
    for kind, name in ((DistributedDataParallel, "__init__"), (LoraModel, "_create_new_module")):
        wrapped[kind] = getattr(kind, name)
        stock = wrapped[kind].__wrapped__
        monkeypatch.setattr(kind, name, stock if name == "__init__" else staticmethod(stock))
    pickle.loads(saved)
    assert hasattr(DistributedDataParallel.__init__, "_int4_lora")
    assert hasattr(LoraModel._create_new_module, "_int4_lora")


@pytest.mark.nightly
def test_two_processes_train_as_one_on_the_joined_batch(square, tmp_path):
    folder = square("g128")
    model = with_adapters(folder)
    model(TOKENS, labels=TOKENS).loss.backward()
    expected = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    results = in_two_processes(folder, SETTINGS, TOKENS, tmp_path)
    assert len(expected) == 28
    for result in results:
        assert result["gradients"].keys() == expected.keys()
        for name, exact in expected.items():
            error = (result["gradients"][name] - exact).abs().max()
            assert error <= 1e-4 * exact.abs().max(), name
        model_bytes = result["packed bytes"]
        assert result["bytes of a forward"] < model_bytes / 100
        assert result["bytes at the start"] < result["bytes of parameters"] + model_bytes / 100
