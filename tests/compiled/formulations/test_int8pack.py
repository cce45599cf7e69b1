"""torch's INT8 operator gets only what it reads within bounds, wherever x lies in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from int4_lora.compiled import prepare
from int4_lora.compiled.formulations import INT8PACK
from int4_lora.compiled.graphs.entry import plan
from support.weights import random_weight, random_x

pytestmark = pytest.mark.versions

ROWS, COLUMNS = 48, 128
OPERATOR = torch.ops.aten._weight_int8pack_mm.default
ALIGNED = 32  # bytes


def weight(**properties):
    shape = {"layout": "channel", "rows": ROWS, "columns": COLUMNS, "dtype": torch.bfloat16}
    return prepare(random_weight(**{**shape, "bits": 8, **properties}))


@pytest.mark.parametrize(
    ("properties", "dtype", "reason"),
    [
        ({}, torch.float32, "both must be bfloat16"),
        ({"dtype": torch.float16}, torch.float16, "both must be bfloat16"),
        ({"layout": "group"}, torch.bfloat16, "groups of columns"),
        ({"symmetric": False}, torch.bfloat16, "zero-points"),
        ({"columns": 24}, torch.bfloat16, "48 x 24, no multiples of 4 x 16"),
        ({"rows": 47}, torch.bfloat16, "47 x 128, no multiples of 4 x 16"),
        ({}, torch.bfloat16, None),
    ],
)
def test_what_it_takes(properties, dtype, reason):
    refusal = INT8PACK.refuses(weight(**properties), dtype, 1)
    assert (refusal is None) == (reason is None)
    assert reason is None or reason in refusal


class Recorded(TorchDispatchMode):
    """Records where the x of each call of the operator lies, and calls it if that is right."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is OPERATOR:
            self.places.append(args[0].data_ptr() % ALIGNED)
            if self.places[-1]:
                return args[0].new_zeros(args[0].shape[0], ROWS)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_operator_gets_a_copy_that_torch_aligns(compiled):
    """An x elsewhere ends the process on CPUs with AVX-512: the operator's loads are aligned."""
    memory = torch.zeros(5 * COLUMNS + ALIGNED, dtype=torch.bfloat16)
    x = memory[1 : 5 * COLUMNS + 1].view(5, COLUMNS).copy_(random_x(5, COLUMNS))
    assert x.data_ptr() % ALIGNED
    bias = torch.ones(ROWS, dtype=torch.bfloat16) if compiled else None  # with it, a graph
    entry = plan(x, weight(), bias=bias, formulation=INT8PACK)
    with Recorded() as recorded:
        entry(x)
    assert recorded.places == [0]
