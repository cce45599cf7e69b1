"""PackedWeight: every format, its properties and rows, and what it refuses."""

import dataclasses
import unittest

import pytest
import torch
from parameterized import parameterized

from int4_lora.reference import PackedWeight, dequantize
from support.weights import bits_of, every_format, random_weight

pytestmark = pytest.mark.versions

GROUP = random_weight("group", symmetric=False)
BLOCK = random_weight("block", symmetric=False)
G_IDX = random_weight("g_idx")
TENSOR = random_weight("tensor", symmetric=False)

ROWS = (
    torch.tensor([12]),
    torch.tensor([11, 0, 7, 7, 12, 3]),
    torch.arange(12, -1, -1),
    slice(3, 12, 4),
    slice(None),
)
ROWS_OF_BLOCKS = (  # of 5 rows: 0 to 4, 5 to 9, 10 to 12
    slice(0, 5),
    slice(5, 13),
    torch.tensor([10, 11, 12]),
    torch.tensor([5, 6, 7, 8, 9, 0, 1, 2, 3, 4]),
    torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 10, 11]),
)


class EveryFormat(unittest.TestCase):
    @parameterized.expand(every_format())
    def test_describes_itself(self, name, arguments):
        weight = random_weight(**arguments)
        layout = arguments["layout"]
        assert weight.strategy == ("group" if layout.startswith("g_idx") else layout)
        assert (weight.out_features, weight.in_features) == weight.shape == (13, 44)
        assert weight.symmetric == arguments["symmetric"]
        assert weight.column_order == (layout not in ("g_idx", "g_idx_unbalanced"))
        tensors = [weight.packed, weight.scale, weight.zero_point, weight.g_idx]
        assert weight.nbytes == sum(t.numel() * t.element_size() for t in tensors if t is not None)
        moved = weight.to("cpu")
        for field in dataclasses.fields(PackedWeight):
            before, after = getattr(weight, field.name), getattr(moved, field.name)
            same = (
                torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
            )
            assert same, field.name

    @parameterized.expand(every_format())
    def test_some_rows_are_those_rows_of_the_dense_weight(self, name, arguments):
        weight = random_weight(**arguments)
        dense = dequantize(weight)
        for index in ROWS_OF_BLOCKS if weight.strategy == "block" else ROWS:
            taken = weight.rows(index)
            chosen = torch.arange(13)[index]
            assert taken.shape == (len(chosen), 44)
            assert torch.equal(bits_of(dequantize(taken)), bits_of(dense[chosen])), index
            assert (taken.strategy, taken.group_size) == (weight.strategy, weight.group_size)
            assert (taken.bits, taken.column_order) == (weight.bits, weight.column_order)
            assert (taken.zero_point is None) == weight.symmetric
            assert (taken.g_idx is None) == (weight.g_idx is None)


def test_rows_keep_a_stated_group_size():
    weight = dataclasses.replace(G_IDX, group_size=11)
    assert weight.rows(slice(3, 4)).group_size == 11
    assert torch.equal(weight.rows(slice(3, 4)).g_idx, G_IDX.g_idx)


def test_rows_of_a_weight_are_a_weight_of_their_own():
    rows = GROUP.rows(slice(None))
    rows.packed.zero_()
    rows.zero_point.zero_()
    assert (GROUP.packed != 0).any()
    assert (GROUP.zero_point != 0).any()


def test_the_shape_tensor_of_a_checkpoint_is_taken():
    weight = dataclasses.replace(GROUP, shape=torch.tensor([13, 44]))
    assert weight.shape == (13, 44)
    assert all(type(length) is int for length in weight.shape)
    assert dataclasses.replace(GROUP, shape=torch.Size([13, 44])).shape == (13, 44)


def test_a_weight_moves_to_a_device_without_values():
    for weight in (G_IDX, TENSOR, BLOCK, random_weight("g_idx_minus_one")):
        moved = weight.to("meta")
        assert moved.packed.is_meta
        assert moved.column_order == weight.column_order


def test_fields_cannot_be_set():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GROUP.bits = 8


def test_two_weights_are_equal_only_if_they_are_one():
    same = dataclasses.replace(GROUP)
    assert same != GROUP
    assert len({GROUP, same}) == 2


def test_a_scale_of_any_value_is_data():
    for value in (float("nan"), float("inf"), 0.0, -0.0, -1.0):
        dataclasses.replace(GROUP, scale=torch.full_like(GROUP.scale, value))


def replaced(weight, **fields):
    return lambda: dataclasses.replace(weight, **fields)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "scale must be a tensor .* got None", replaced(GROUP, scale=None)),
        (TypeError, "scale must be .* got int32", replaced(GROUP, scale=GROUP.scale.int())),
        (TypeError, "scale must be .* got float64", replaced(GROUP, scale=GROUP.scale.double())),
        (ValueError, r"scale .* got \[13\]", replaced(GROUP, scale=GROUP.scale[:, 0])),
        (ValueError, r"scale .* got \[12, 4\]", replaced(GROUP, scale=GROUP.scale[1:])),
        (ValueError, "scale has 3 groups", replaced(GROUP, scale=GROUP.scale[:, 1:])),
        (ValueError, "scale has 0 groups", replaced(GROUP, scale=GROUP.scale[:, :0])),
        (ValueError, r"scale .* got \[\]", replaced(GROUP, scale=GROUP.scale[0, 0])),
        (TypeError, "packed must be int32, got uint8", replaced(GROUP, packed=GROUP.packed.byte())),
        (ValueError, r"packed .* got \[13, 5\]", replaced(GROUP, packed=GROUP.packed[:, 1:])),
        (ValueError, r"packed .* got \[12, 6\]", replaced(GROUP, packed=GROUP.packed[1:])),
        (ValueError, r"packed .* got \[78\]", replaced(GROUP, packed=GROUP.packed.flatten())),
        (ValueError, r"packed .* 8 bits", replaced(GROUP, bits=8)),
        (ValueError, "bits must be 4 or 8, got 2", replaced(GROUP, bits=2)),
        (ValueError, r"shape .* positive .* \(-13, 44\)", replaced(GROUP, shape=(-13, 44))),
        (ValueError, r"shape .* positive .* \(0, 44\)", replaced(GROUP, shape=(0, 44))),
        (ValueError, "packed .* 4611686018427387904", replaced(GROUP, shape=(13, 2**62))),
        (ValueError, "shape must be .out_features", replaced(GROUP, shape=(13, 44, 1))),
        (ValueError, "shape must be .out_features", replaced(GROUP, shape=44)),
        (TypeError, "shape must hold two ints", replaced(GROUP, shape=(13.0, 44))),
        (TypeError, "shape must be int64", replaced(GROUP, shape=torch.tensor([13.0, 44.0]))),
        (ValueError, "shape must be .out_features", replaced(GROUP, shape=torch.ones(2, 2).long())),
        (ValueError, r"zero_point .* dim 0 .* got \[13, 1\]",
         replaced(GROUP, zero_point=torch.zeros(13, 1, dtype=torch.int32))),
        (TypeError, "zero_point must be int32, got int8",
         replaced(GROUP, zero_point=torch.zeros(13, 4, dtype=torch.int8))),
        (TypeError, "zero_point must be int8, got int32",
         replaced(TENSOR, zero_point=torch.zeros(1, dtype=torch.int32))),
        (ValueError, r"zero_point .* got \[2\]",
         replaced(TENSOR, zero_point=torch.zeros(2, dtype=torch.int8))),
        (ValueError, r"zero_point must be in \[-8, 7\], got 8",
         replaced(TENSOR, zero_point=torch.tensor([8], dtype=torch.int8))),
        (ValueError, r"zero_point .* got \[6, 3\]",
         replaced(BLOCK, zero_point=BLOCK.zero_point.T)),
        (ValueError, r"g_idx must be in \[-1, 4\), .* got 4",
         replaced(G_IDX, g_idx=G_IDX.g_idx + 1)),
        (ValueError, r"g_idx must be in \[-1, 4\), .* got -2",
         replaced(G_IDX, g_idx=G_IDX.g_idx - 2)),
        (ValueError, "scale has 3 groups, which do not divide",
         replaced(random_weight("g_idx_minus_one"), scale=GROUP.scale[:, :3],
                  g_idx=random_weight("g_idx_minus_one").g_idx.clamp(max=2))),
        (ValueError, r"g_idx .* got \[43\]", replaced(G_IDX, g_idx=G_IDX.g_idx[1:])),
        (TypeError, "g_idx must be int32, got int64", replaced(G_IDX, g_idx=G_IDX.g_idx.long())),
        (ValueError, "g_idx needs a scale", replaced(TENSOR, g_idx=G_IDX.g_idx)),
        (ValueError, "g_idx needs a scale", replaced(BLOCK, g_idx=G_IDX.g_idx)),
        (ValueError, "group_size must be .* 44 / 4, got 12", replaced(GROUP, group_size=12)),
        (ValueError, "group_size must be positive, got 0", replaced(GROUP, group_size=0)),
        (TypeError, "group_size must be an int", replaced(GROUP, group_size=11.0)),
        (ValueError, "group_size must be None", replaced(TENSOR, group_size=44)),
        (ValueError, "group_size of blocks", replaced(BLOCK, group_size=(5, 0))),
        (ValueError, "group_size of blocks", replaced(BLOCK, group_size=(10**30, 10**30))),
        (ValueError, "group_size must make 4 groups of 44 columns, as scale has, got 999",
         replaced(G_IDX, group_size=999)),
        (TypeError, "shape must hold two ints", replaced(GROUP, shape=(True, True))),
        (ValueError, "shape must be .out_features", replaced(GROUP, shape=b"\x0d\x2c")),
        (ValueError, "index must choose at least one row, got none",
         lambda: GROUP.rows(torch.tensor([], dtype=torch.int64))),
        (ValueError, "index must choose at least one row", lambda: GROUP.rows(slice(5, 5))),
        (ValueError, r"index must be in \[0, 13\), .* got slice\(9, 14, None\)",
         lambda: GROUP.rows(slice(9, 14))),
        (ValueError, r"index must be in \[0, 13\), .* got slice\(-14, 3, None\)",
         lambda: GROUP.rows(slice(-14, 3))),
        (ValueError, r"index must be in \[0, 13\), the rows of weight, got 13",
         lambda: GROUP.rows(torch.tensor([0, 13]))),
        (ValueError, r"index must be in \[0, 13\), .* got -1",
         lambda: GROUP.rows(torch.tensor([-1]))),
        (TypeError, "index must be int64, got int32",
         lambda: GROUP.rows(torch.tensor([1], dtype=torch.int32))),
        (TypeError, "index must be a tensor of int64, got list", lambda: GROUP.rows([1])),
        (ValueError, r"index must be \[rows\]", lambda: GROUP.rows(torch.tensor([[1]]))),
        (ValueError, "index must keep to the blocks of 5 rows .* got row 5 in one block with row 4",
         lambda: BLOCK.rows(slice(4, 9))),
        (ValueError, "got row 0 in one block with row 10",
         lambda: BLOCK.rows(torch.tensor([10, 11, 12, 0, 1]))),
        (TypeError, "device must be a torch.device", lambda: GROUP.to(torch.float16)),
        (ValueError, "group_size of blocks", replaced(BLOCK, group_size=(5, 8, 1))),
        (ValueError, "scale must be one per block", replaced(BLOCK, group_size=(5, 11))),
        (ValueError, "one device: packed is on cpu, scale is on meta",
         replaced(GROUP, scale=GROUP.scale.to("meta"))),
        (ValueError, "one device: packed is on cpu, zero_point is on meta",
         replaced(GROUP, zero_point=GROUP.zero_point.to("meta"))),
    ],
)  # fmt: skip
def test_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()
