"""torch.compile compiles the reference as it is: one graph, any number of tokens, any ids."""

import unittest

import pytest
import torch
from packaging.version import Version
from parameterized import parameterized

from int4_lora.reference import (
    LoRASlice,
    error_bound,
    int4_linear,
    int4_lora_linear,
)
from support.weights import narrow, random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

WEIGHT = random_weight(symmetric=False)
STACK = random_stack()
X = random_x()
IDS = torch.tensor([0, -1, 2, 1, 2, -1])
BIAS = torch.linspace(-1, 1, 13)
# Inductor's C++ fails with emulate_precision_casts in 2.8 and ignores it in 2.9 and 2.10
EMULATED = (False, True) if Version("2.11") <= Version(torch.__version__) else (False,)

SLICES = [LoRASlice(narrow(STACK, 5), 0), LoRASlice(narrow(STACK, 8, 5), 5)]
COMPILED = [
    ("base", WEIGHT, None, None),
    ("stack", WEIGHT, STACK, IDS),
    ("slices", WEIGHT, SLICES, IDS),
    ("g_idx", random_weight("g_idx_unbalanced"), STACK, IDS),
    ("block", random_weight("block", symmetric=False), STACK, IDS),
    ("tensor_8bit", random_weight("tensor", symmetric=False, bits=8), STACK, IDS),
]


class Compiled(unittest.TestCase):
    def setUp(self):
        torch.compiler.reset()

    @parameterized.expand(COMPILED)
    def test_fullgraph_takes_the_function_as_it_is(self, name, weight, lora, ids):
        compiled = torch.compile(int4_lora_linear, fullgraph=True)
        for dtype in (torch.float32, torch.bfloat16):
            x = X.to(dtype)
            exact = int4_lora_linear(x.double(), weight, lora, ids, BIAS)
            y = compiled(x, weight, lora, ids, BIAS)
            bound = error_bound(x, weight, lora, ids, BIAS)
            assert y.dtype == dtype
            assert ((y.double() - exact).abs() <= bound).all()

    def test_scales_in_bfloat16_need_the_rounding_that_inductor_leaves_out(self):
        check_the_rounding_of_the_weight(torch.bfloat16)

    @pytest.mark.nightly
    def test_scales_in_float16_need_the_rounding_that_inductor_leaves_out(self):
        check_the_rounding_of_the_weight(torch.float16)

    def test_slices_take_any_number_of_tokens(self):
        compiled = torch.compile(
            int4_lora_linear, fullgraph=True, dynamic=True, backend="aot_eager"
        )
        for tokens in (5, 9):
            x, ids = random_x(tokens), torch.arange(tokens) % 4 - 1
            expected = int4_lora_linear(x, WEIGHT, SLICES, ids)
            torch.testing.assert_close(compiled(x, WEIGHT, SLICES, ids), expected)

    def test_one_graph_serves_any_number_of_tokens_and_any_ids(self):
        graphs = []

        def count(graph, _inputs):
            graphs.append(graph)
            return graph

        compiled = torch.compile(int4_lora_linear, fullgraph=True, dynamic=True, backend=count)
        for tokens in (5, 9, 17):
            ids = torch.arange(tokens) % 4 - 1
            x = random_x(tokens)
            expected = int4_lora_linear(x, WEIGHT, STACK, ids)
            torch.testing.assert_close(compiled(x, WEIGHT, STACK, ids), expected)
        assert len(graphs) == 1

    def test_an_id_outside_the_range_contributes_nothing_in_a_graph(self):
        compiled = torch.compile(int4_lora_linear, fullgraph=True, backend="aot_eager")
        y = compiled(X, WEIGHT, STACK, torch.full((6,), 99))
        torch.testing.assert_close(y, int4_linear(X, WEIGHT))


def check_the_rounding_of_the_weight(dtype):
    """Inductor keeps 16-bit numbers in float32 between fused steps unless it is told not to."""
    weight = random_weight(symmetric=False, dtype=dtype)
    for x in (X, X.to(dtype)):
        exact = int4_lora_linear(x.double(), weight, STACK, IDS, BIAS)
        for emulate in EMULATED:
            torch.compiler.reset()
            options = {"emulate_precision_casts": emulate}
            compiled = torch.compile(int4_lora_linear, fullgraph=True, options=options)
            bound = error_bound(x, weight, STACK, IDS, BIAS, weight_rounded=emulate)
            y = compiled(x, weight, STACK, IDS, BIAS)
            assert ((y.double() - exact).abs() <= bound).all(), (dtype, emulate)
