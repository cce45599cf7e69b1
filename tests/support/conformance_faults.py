"""Backends with faults that are easy to miss."""

import sys
from dataclasses import replace

import torch

from int4_lora.reference import LoRASlice, LoRAStack, dequantize
from support.conformance_backends import Layer


class PreparesInPlace(Layer):
    """Its ``prepare`` writes to the checkpoint's scales."""

    def prepare(self, weight):
        weight.scale.zero_()
        return weight


class Exits(Layer):
    """It exits the program with code 0."""

    def base(self, x, weight):
        print("on the way out")
        sys.exit(0)


class FirstScalings(Layer):
    """It uses the scalings of the first slice for all slices."""

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        if isinstance(lora, list):
            scaling = lora[0].stack.scaling
            lora = [
                LoRASlice(LoRAStack(part.stack.a, part.stack.b, scaling), part.start)
                for part in lora
            ]
        return super().int4_lora_linear(x, weight, lora, adapter_ids, bias)


class NoBiasOfSlices(Layer):
    """It drops the bias where there are slices."""

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        bias = None if isinstance(lora, list) else bias
        return super().int4_lora_linear(x, weight, lora, adapter_ids, bias)


class LastAdapter(Layer):
    """It ignores the sixteenth adapter."""

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        if adapter_ids is not None:
            adapter_ids = torch.where(adapter_ids == 15, -1, adapter_ids)
        return super().int4_lora_linear(x, weight, lora, adapter_ids, bias)


class FirstBias(Layer):
    """It keeps the bias of the first call with a weight."""

    def __init__(self):
        self.bias = {}

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        if bias is not None:
            bias = self.bias.setdefault(id(weight), bias.clone())
        return super().int4_lora_linear(x, weight, lora, adapter_ids, bias)


class Contiguous(Layer):
    """It reads x as if it were contiguous."""

    def base(self, x, weight):
        return super().base(torch.as_strided(x, x.shape, (x.shape[1], 1)), weight)


class OneNanForAll(Layer):
    """A NaN of one token reaches every token."""

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


class ThreeFaults(Layer):
    """Groups by position, an adapter for tokens without one, and lost outputs."""

    def base(self, x, weight):
        by_position = weight if weight.g_idx is None else replace(weight, g_idx=None)
        y = x.float() @ dequantize(by_position, torch.float32).T
        y[:, y.shape[1] // 16 * 16 or y.shape[1] :] = 0
        return y

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        if isinstance(lora, LoRAStack):
            adapter_ids = torch.where(adapter_ids < 0, lora.adapters - 1, adapter_ids)
        return super().int4_lora_linear(x, weight, lora, adapter_ids, bias)
