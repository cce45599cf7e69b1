"""A second layer's sizes are constants of its graph, as the first one's are."""

import dataclasses

import torch
from torch.fx.experimental.symbolic_shapes import free_symbols

from int4_lora.compiled import graphs, prepare, prepare_lora
from int4_lora.compiled.formulations import INT4PACK
from int4_lora.reference import LoRAStack, quantize


def symbols_of(in_features, out_features, tokens=5):
    """Return the symbols in the sizes of each input of the graph that a layer is traced to."""
    found = []

    def backend(graph, inputs):
        for node in graph.graph.find_nodes(op="placeholder"):
            value = node.meta["example_value"]
            if isinstance(value, torch.Tensor):
                found.append({str(one) for size in value.shape for one in free_symbols(size)})
        return graph.forward

    formulation = dataclasses.replace(INT4PACK, backend=lambda weight, bucket: backend)
    generator = torch.Generator().manual_seed(in_features)
    dense = torch.randn(out_features, in_features, generator=generator)
    weight = prepare(quantize(dense.bfloat16(), group_size=32))
    a, b = torch.randn(2, in_features).bfloat16(), torch.randn(out_features, 2).bfloat16()
    lora = prepare_lora(LoRAStack.stack([(a, b, 1.0), (a, b, 0.5)]))
    x = torch.randn(tokens, in_features, dtype=torch.bfloat16)
    ids = torch.zeros(tokens, dtype=torch.int64)
    graphs.run(formulation, x, weight, lora.slices, ids, None)
    return found


def test_only_the_number_of_tokens_is_a_symbol_in_every_layer():
    for in_features, out_features in ((64, 32), (128, 48), (96, 80)):
        symbols = symbols_of(in_features, out_features)
        assert symbols, "nothing was traced"
        assert len(set().union(*symbols)) == 1  # x and adapter_ids share it
        assert sum(map(bool, symbols)) == 2


def test_tensors_that_were_one_and_then_are_not_get_a_graph_of_their_own():
    """Without guards a graph of one tensor in two places would read the first for both."""
    from int4_lora.compiled import PreparedLoRA, int4_lora_linear
    from int4_lora.compiled.prepared_lora import PreparedSlice

    weight = prepare(quantize(torch.randn(32, 64), group_size=32))
    x, ids = torch.randn(3, 64), torch.tensor([0, 1, -1])
    shared = torch.randn(2, 2, 64)
    bt, scaling = torch.randn(2, 2, 16), torch.ones(2)
    same = PreparedLoRA(
        (PreparedSlice(shared, bt, scaling, 0), PreparedSlice(shared, bt, scaling, 16))
    )
    other = PreparedLoRA(
        (
            PreparedSlice(shared, bt, scaling, 0),
            PreparedSlice(torch.randn(2, 2, 64), torch.randn(2, 2, 16), torch.ones(2), 16),
        )
    )
    for lora in (same, other):
        y = int4_lora_linear(x, weight, lora, ids)
        base = int4_lora_linear(x, weight)
        for one in lora.slices:
            h = torch.stack([one.a[max(i, 0)] @ row for i, row in zip(ids, x, strict=True)])
            delta = torch.stack(
                [row @ one.bt[max(i, 0)] * (i >= 0) for i, row in zip(ids, h, strict=True)]
            )
            torch.testing.assert_close(
                y[:, one.start : one.stop], base[:, one.start : one.stop] + delta
            )
