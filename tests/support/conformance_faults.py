"""Backends with faults that are easy to miss."""

import sys

import torch

from int4_lora.reference import LoRASlice, LoRAStack
from support.conformance_backends import Layer


class PreparesInPlace(Layer):
    """Its ``prepare`` writes to the checkpoint's scales."""

    def prepare(self, weight):
        weight.scale.zero_()
        return weight


class Exits(Layer):
    """It ends the program, as if all were right."""

    def base(self, x, weight):
        print("on the way out")
        sys.exit(0)


class FirstScalings(Layer):
    """The scalings of the first slice for all."""

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        if isinstance(lora, list):
            stacks = [LoRAStack(one.stack.a, one.stack.b, lora[0].stack.scaling) for one in lora]
            lora = [LoRASlice(s, one.start) for s, one in zip(stacks, lora, strict=True)]
        return super().int4_lora_linear(x, weight, lora, adapter_ids, bias)


class NoBiasOfSlices(Layer):
    """The bias is dropped where there are slices."""

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        bias = None if isinstance(lora, list) else bias
        return super().int4_lora_linear(x, weight, lora, adapter_ids, bias)


class LastAdapter(Layer):
    """The sixteenth adapter is not there."""

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        if adapter_ids is not None:
            adapter_ids = torch.where(adapter_ids == 15, -1, adapter_ids)
        return super().int4_lora_linear(x, weight, lora, adapter_ids, bias)


class FirstBias(Layer):
    """The bias of the first call with a weight is kept."""

    def __init__(self):
        self.bias = {}

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        if bias is not None:
            bias = self.bias.setdefault(id(weight), bias.clone())
        return super().int4_lora_linear(x, weight, lora, adapter_ids, bias)


class Contiguous(Layer):
    """x is read as if it were contiguous."""

    def base(self, x, weight):
        return super().base(torch.as_strided(x, x.shape, (x.shape[1], 1)), weight)


class OneNanForAll(Layer):
    """A token's NaN reaches every token."""

    def base(self, x, weight):
        return super().base(x, weight) + 0 * x.sum()


class OwnBuffer(Layer):
    """Every result is a view of one buffer."""

    def __init__(self):
        self.buffer = torch.empty(0)

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        y = super().int4_lora_linear(x, weight, lora, adapter_ids, bias)
        if self.buffer.dtype != y.dtype or self.buffer.numel() < y.numel():
            self.buffer = torch.empty(y.numel(), dtype=y.dtype)
        view = self.buffer[: y.numel()].view_as(y)
        view.copy_(y)
        return view
