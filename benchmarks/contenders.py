"""Who is measured: our layer, its formulations, and what else computes the same on this machine.

Source: ``benchmarks/results/README.md``.
"""

import torch
from torch.nn.functional import linear

from int4_lora import reference
from int4_lora.compiled import graphs, int4_linear, int4_lora_linear, prepare, prepare_lora
from int4_lora.compiled.choice import candidates
from int4_lora.compiled.formulations import int4pack
from int4_lora.compiled.int4pack_weight import Int4PackWeight
from int4_lora.compiled.timing import copies_beyond_the_cache

ADAPTERS, RANK = 4, 16
PEERS = ("dense", "aten int4pack")


class Layer:
    """One layer's operands, as many times as it takes to leave the cache behind.

    Args:
        rows: out_features.
        columns: in_features.
        tokens: rows of x.
        dtype: of x, scales and adapters.
        group_size: of the scales.
    """

    def __init__(self, rows, columns, tokens, dtype, group_size):
        torch.manual_seed(0)
        self.dtype = dtype
        self.dense = torch.randn(rows, columns).to(dtype)
        self.weight = reference.quantize(self.dense, group_size=group_size)
        self.x = torch.randn(tokens, columns).to(dtype)
        self.ids = torch.arange(tokens) % ADAPTERS
        a = torch.randn(ADAPTERS, RANK, columns).to(dtype) / columns**0.5
        b = torch.randn(ADAPTERS, rows, RANK).to(dtype)
        self.stack = reference.LoRAStack(a, b, torch.full((ADAPTERS,), 0.5))
        self.lora = prepare_lora(self.stack)
        self.prepared = {}

    def in_layout(self, layout):
        """Return copies of the weight in one layout."""
        if layout not in self.prepared:
            count = copies_beyond_the_cache(self.weight.nbytes)
            copied = [prepare(self.weight, layout=layout) for _ in range(count)]
            self.prepared[layout] = copied
        return self.prepared[layout]

    def contenders(self):
        """Return functions of the round's number, by name: one call of one layer each."""
        ours = self.in_layout(None)
        dense = self.dense_copies()
        found = {
            "ours": lambda n: int4_linear(self.x, ours[n % len(ours)]),
            "ours + LoRA": lambda n: int4_lora_linear(
                self.x, ours[n % len(ours)], self.lora, self.ids
            ),
            "dense": lambda n: linear(self.x, dense[n % len(dense)]),
        }
        if isinstance(ours[0], Int4PackWeight):
            found["aten int4pack"] = lambda n: int4pack.base(self.x, ours[n % len(ours)])
        for weights in (self.in_layout("planes"), ours):
            for one in candidates(weights[0], self.dtype, self.x.shape[0]):
                found[f"formulation {one.name}"] = self._formulation(one, weights)
        return found

    def compiled_contenders(self):
        """Return functions, by name, and how many layers each runs in one graph."""
        ours, dense = self.in_layout(None), self.dense_copies()
        x, lora, ids = self.x, self.lora, self.ids
        chains = {
            "ours": (lambda weight: int4_linear(x, weight), ours),
            "ours + LoRA": (lambda weight: int4_lora_linear(x, weight, lora, ids), ours),
            "dense": (lambda weight: linear(x, weight), dense),
        }
        if isinstance(ours[0], Int4PackWeight):
            chains["aten int4pack"] = (lambda weight: int4pack.base(x, weight), ours)
        return {name: (_chain(*chain), len(chain[1])) for name, chain in chains.items()}

    def dense_copies(self):
        """Return copies of the dense weight."""
        return [self.dense.clone() for _ in range(copies_beyond_the_cache(self.dense.nbytes))]

    def _formulation(self, formulation, weights):
        return lambda n: graphs.run(formulation, self.x, weights[n % len(weights)], (), None, None)

    def lora_share(self):
        """Return the share of bytes, or of operations, that the active adapters are."""
        active = len(self.ids.unique())
        rows, columns = self.dense.shape
        if self.x.shape[0] <= 16:
            return active * RANK * (rows + columns) * self.dtype.itemsize / self.weight.nbytes
        return RANK * (rows + columns) / (rows * columns)


def _chain(layer, weights):
    """Return a function that runs a layer on every weight in one compiled graph."""
    compiled = torch.compile(lambda: [layer(weight) for weight in weights], dynamic=False)
    return lambda n: compiled()
