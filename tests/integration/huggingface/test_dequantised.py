import copy
import operator
import pickle

import pytest
import torch

from int4_lora.compiled import prepare
from int4_lora.integration.huggingface import dequantised
from int4_lora.integration.huggingface.dequantised import DequantisedWeight, dense_weight
from int4_lora.reference import PackedWeight

# rows of codes 0..7 and -8..-1 (nibbles are code + 8), scales 2 and 3: worked by hand
PACKED = torch.tensor([[0xFEDCBA98 - 2**32], [0x76543210]], dtype=torch.int32)
SCALE = torch.tensor([[2.0], [3.0]])
VALUES = torch.tensor(
    [[0.0, 2, 4, 6, 8, 10, 12, 14], [-24.0, -21, -18, -15, -12, -9, -6, -3]],
)
WRITES = {
    "data": lambda weight: setattr(weight, "data", VALUES),
    "add, as torch's operator": lambda weight: operator.iadd(weight.data, VALUES),
    "multiply, as torch's operator": lambda weight: operator.imul(weight, 2),
    "detach": lambda weight: weight.detach().mul_(2),
    "copy_": lambda weight: weight.copy_(VALUES),
    "row": lambda weight: weight.__setitem__(0, 1.0),
    "column": lambda weight: weight[:, 1].fill_(0),
    "transposed": lambda weight: weight.T.add_(1),
    "view": lambda weight: weight.view(-1).zero_(),
    "no-op cast": lambda weight: weight.to(torch.float32).mul_(2),
    "split": lambda weight: weight.split(1)[0].zero_(),
    "out": lambda weight: torch.add(VALUES, VALUES, out=weight),
    "set_": lambda weight: weight.set_(VALUES),
    "init": lambda weight: torch.nn.init.zeros_(weight),
    "in a list": lambda weight: torch._foreach_add_([VALUES.clone(), weight], 1),
}


@pytest.fixture
def weight():
    return DequantisedWeight(prepare(PackedWeight(PACKED, SCALE, shape=(2, 8))), torch.float32)


def test_the_values_are_those_worked_by_hand(weight):
    assert torch.equal(dense_weight(weight.weight, torch.float32), VALUES)
    assert torch.equal(weight + 0, VALUES)
    assert torch.equal(weight.T + 0, VALUES.T)
    assert torch.equal(torch.eye(8) @ weight.T, VALUES.T)
    assert weight.tolist() == VALUES.tolist()
    assert torch.equal(torch.from_numpy(weight.numpy()), VALUES)
    assert weight[1, 0] == -24
    assert f"{weight[1, 0]:.1f}" == "-24.0"


def test_operations_that_take_a_list(weight):
    assert torch.equal(torch.cat([weight, weight]), torch.cat([VALUES, VALUES]))
    assert torch.equal(torch.stack([VALUES, weight], 2), torch.stack([VALUES, VALUES], 2))
    assert torch.equal(torch.block_diag(weight, weight), torch.block_diag(VALUES, VALUES))
    assert torch.equal(torch._foreach_add([weight], 1)[0], VALUES + 1)


def test_results_are_plain_tensors(weight):
    for result in (
        weight + 0,
        weight.clone(),
        weight.to(torch.bfloat16),
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),
    ):
        assert type(result) is torch.Tensor
        result.add_(1)


def test_nothing_is_dequantised_for_what_the_tensor_is(weight, monkeypatch):
    monkeypatch.setattr(dequantised, "dense_weight", None)
    assert (weight.shape, weight.dtype, weight.device.type) == ((2, 8), torch.float32, "cpu")
    assert not weight.requires_grad
    assert not isinstance(weight, torch.nn.Parameter)
    assert weight.data.dtype == torch.float32
    assert repr(weight) == "DequantisedWeight(shape=[2, 8], dtype=torch.float32)"


@pytest.mark.parametrize("name", WRITES)
def test_writes_raise(weight, name):
    with pytest.raises(RuntimeError, match=r"cannot be written to.*int4-lora merge"):
        WRITES[name](weight)
    assert torch.equal(weight + 0, VALUES)


def test_gradients_flow_through_it_without_keeping_the_values(weight):
    x = torch.zeros(1, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda o: o):
        y = torch.nn.functional.linear(x, weight)
    y.backward(torch.tensor([[1.0, 1.0]]))
    assert torch.equal(x.grad[0], VALUES.sum(0))
    assert not any(type(one) is torch.Tensor and one.shape == (2, 8) for one in kept)
