import copy
import io

import pytest
import torch
from safetensors.torch import load, save

from int4_lora.integration.huggingface.lazy_tensor import LazyTensor

VALUES = torch.arange(12, dtype=torch.int32).view(3, 4) * 5


class Counting:
    """Values that count how often they are asked for."""

    calls = 0

    def __call__(self):
        self.calls += 1
        return VALUES.clone()


@pytest.fixture
def counting():
    return Counting()


@pytest.fixture
def lazy(counting):
    return LazyTensor(counting, like=VALUES)


def test_what_it_looks_like_costs_nothing(lazy, counting):
    assert lazy.shape == lazy.size() == (3, 4)
    assert (lazy.dtype, lazy.device, lazy.ndim) == (torch.int32, torch.device("cpu"), 2)
    assert (lazy.numel(), lazy.nbytes, len(lazy)) == (12, 48, 3)
    assert not lazy.is_floating_point()
    assert not lazy.requires_grad
    assert repr(lazy) == "LazyTensor(shape=[3, 4], dtype=torch.int32)"
    assert {lazy: 1}[lazy] == 1
    assert counting.calls == 0


USES = {
    "an operation": lambda lazy: lazy + 0,
    "an operation on several": lambda lazy: torch.cat([lazy[:1], lazy[1:]]),
    "a view": lambda lazy: lazy.detach(),
    "another device": lambda lazy: lazy.to("cpu", copy=True),
    "NumPy": lambda lazy: torch.from_numpy(lazy.numpy()),
    "a list": lambda lazy: torch.tensor(lazy.tolist(), dtype=torch.int32),
    "deepcopy": copy.deepcopy,
    "copy_": lambda lazy: torch.empty(3, 4, dtype=torch.int32).copy_(lazy),
    "its storage": lambda lazy: torch.tensor([], dtype=torch.int32).set_(
        lazy.untyped_storage(), 0, (3, 4)
    ),
    "safetensors": lambda lazy: load(save({"words": lazy}))["words"],
    "torch.save": lambda lazy: torch.load(_saved(lazy), weights_only=True),
}


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("use", USES)
def test_every_use_gives_the_values(lazy, counting, use):
    values = USES[use](lazy)
    assert type(values) is torch.Tensor
    assert values.dtype == torch.int32
    assert torch.equal(values, VALUES)
    assert counting.calls == 1


def test_the_values_are_computed_once_and_written_to_as_any_tensor(lazy, counting):
    assert lazy.data_ptr() == lazy.data_ptr() == lazy.plain().data_ptr()
    lazy.zero_()
    assert not lazy.any()
    assert counting.calls == 1
