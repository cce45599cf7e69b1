"""Make one layer's operands on one device, in enough copies to exceed the cache.

Base and adapters contribute about equally to y, so that an error in either shows in the result.

Source: ``benchmarks/results/README.md``.
"""

import dataclasses

import torch

from benchmarks.weights import random_weight
from int4_lora import reference
from int4_lora.compiled import layouts, prepare
from int4_lora.compiled.selection.timing import copies_beyond_the_cache

ADAPTERS, RANK = 4, 16  # unless a benchmark varies them


class Layer:
    """One layer's operands.

    Args:
        rows: out_features.
        columns: in_features.
        tokens: rows of x.
        dtype: the dtype of x, scales and adapters.
        group_size: columns that share a scale.
        device: the device of all tensors.
        adapters: the number of adapters in the stack; tokens use them in turn.
        rank: their rank.
        format: how the weight is stored, a name in ``benchmarks.weights.FORMATS``.
    """

    def __init__(
        self,
        rows,
        columns,
        tokens,
        dtype,
        group_size,
        device="cpu",
        *,
        adapters=ADAPTERS,
        rank=RANK,
        format="int4",
    ):
        generator = torch.Generator().manual_seed(0)
        weight = random_weight(format, rows, columns, dtype, group_size, generator)
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        a = torch.randn(adapters, rank, columns, generator=generator) / columns**0.5
        b = torch.randn(adapters, rows, rank, generator=generator) * (RANK / rank) ** 0.5
        scaling = 2.0 ** (torch.arange(adapters) % 4 - 2)  # powers of 2: folding into B is exact
        stack = reference.LoRAStack(a.to(dtype), b.to(dtype), scaling)
        self.rows, self.columns, self.tokens = rows, columns, tokens
        self.dtype, self.group_size, self.format = dtype, group_size, format
        self.weight = weight.to(device)
        self.dense = reference.dequantize(self.weight, dtype)
        self.x = x.to(device)
        self.ids = (torch.arange(tokens) % adapters).to(device)
        self.stack = stack.to(device)
        self._prepared = {}

    @property
    def device(self):
        """The device of all tensors."""
        return self.x.device

    @property
    def first_layout(self):
        """The layout that ``prepare`` chooses."""
        return layouts(self.weight)[0]

    @property
    def copies(self):
        """The number of copies of the weight that exceed the cache."""
        return copies_beyond_the_cache(self.weight.nbytes, self.device.type)

    @property
    def active_adapters(self):
        """The number of adapters that the tokens use."""
        return min(self.tokens, self.stack.adapters)

    def in_layout(self, layout):
        """Return copies of the weight in one layout; no two copies share a tensor."""
        if layout not in self._prepared:
            fresh = [_copied(self.weight) for _ in range(self.copies)]
            self._prepared[layout] = [prepare(weight, layout=layout) for weight in fresh]
        return self._prepared[layout]

    def dense_copies(self):
        """Return copies of the dense weight."""
        count = copies_beyond_the_cache(self.dense.nbytes, self.device.type)
        return [self.dense.clone() for _ in range(count)]

    def bytes_to_move(self, *, dense, lora):
        """Return the bytes of weight, active adapters, x and y that one call must move."""
        weight = self.dense.nbytes if dense else self.weight.nbytes
        adapters = self.active_adapters * self._widths if lora else 0
        outputs = self.tokens * self.rows
        return weight + self.x.nbytes + (adapters + outputs) * self.dtype.itemsize

    def operations(self, *, lora):
        """Return the multiplications and additions of one call."""
        weights = self.rows * self.columns + (self._widths if lora else 0)
        return 2 * self.tokens * weights

    def lora_share(self):
        """Return the active adapters' share of the bytes, or above 16 tokens of the operations."""
        if self.tokens <= 16:
            return self.active_adapters * self._widths * self.dtype.itemsize / self.weight.nbytes
        return self._widths / (self.rows * self.columns)

    @property
    def _widths(self):
        """The number of values in one adapter."""
        return self.stack.rank * (self.rows + self.columns)


def _copied(weight):
    return dataclasses.replace(weight, packed=weight.packed.clone(), scale=weight.scale.clone())
