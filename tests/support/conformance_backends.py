"""Backends with faults, and correct ones that round in another order."""

import dataclasses
from typing import ClassVar

import torch

import int4_lora.reference as reference
from int4_lora.reference import Float4Weight, dequantize, error_bound, int4_lora_linear
from int4_lora.reference.awq import AWQTensors
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.diagnosis.definition_steps import answer_of
from int4_lora.reference.conformance.judging.yardstick import one_by_one, yardstick
from int4_lora.reference.conformance.manifest import Manifest
from int4_lora.reference.dequantization import (
    centred_codes,
    scale_of_each_weight,
    unrounded_weight,
)
from int4_lora.reference.gptq import GPTQTensors
from int4_lora.reference.linear import as_slices


class Layer:
    """A backend of the two layers, whose base product is a method to override."""

    def int4_linear(self, x, weight, bias=None):
        return self.int4_lora_linear(x, weight, None, None, bias)

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        delta = 0.0
        if lora is not None:
            wide = x.float()
            layer = int4_lora_linear(wide, weight, lora, adapter_ids)
            delta = layer - int4_lora_linear(wide, weight)
        y = self.base(x, weight).float() + delta
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def base(self, x, weight):
        return x.float() @ dequantize(weight, torch.float32).T


class HalfSums(Layer):
    """Sums in float16, product by product."""

    def base(self, x, weight):
        return one_by_one(x.half(), dequantize(weight, torch.float16))


class HalfAtomics(Layer):
    """Blocks of 32 columns summed in float32 and added up in float16."""

    def base(self, x, weight):
        dense = dequantize(weight, torch.float32)
        total = torch.zeros(x.shape[0], len(dense), dtype=torch.float16)
        for start in range(0, x.shape[1], 32):
            part = slice(start, start + 32)
            total += (x[:, part].float() @ dense[:, part].T).half()
        return total


class ScaleOfX(Layer):
    """The scale rounded to the dtype of x, as in engines that keep it in the model's."""

    def base(self, x, weight):
        scale = scale_of_each_weight(weight).to(x.dtype)
        return x.float() @ (centred_codes(weight).to(x.dtype) * scale).float().T


class StaleIds:
    """Adapter ids kept from the first call of this number of tokens."""

    def __init__(self):
        self.kept = {}

    def prepare(self, weight):
        self.kept.clear()
        return weight

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        if adapter_ids is not None:
            adapter_ids = self.kept.setdefault(len(x), adapter_ids.clone())
        return int4_lora_linear(x, weight, lora, adapter_ids, bias)


class EarlierIds(StaleIds):
    """The adapter ids of the previous call."""

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        if adapter_ids is None:
            return int4_lora_linear(x, weight, lora, adapter_ids, bias)
        late = self.kept.get(len(x), adapter_ids)
        self.kept[len(x)] = adapter_ids.clone()
        return int4_lora_linear(x, weight, lora, late, bias)


class KeptIds(StaleIds):
    """The ids of the first call of this number of tokens, of whatever case."""

    prepare = None


class LateIds(EarlierIds):
    """The ids of the previous call of this number of tokens, of whatever case."""

    prepare = None


class MaskedGather(Layer):
    """The first adapter's delta, times 0, for tokens without an adapter."""

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        y = self.base(x, weight).float()
        for part in as_slices(lora):
            chosen = adapter_ids.clamp(min=0)
            h = torch.einsum("tk,trk->tr", x.float(), part.stack.a[chosen].float())
            delta = torch.einsum("tr,tor->to", h, part.stack.b[chosen].float())
            used = part.stack.scaling[chosen].float() * (adapter_ids >= 0)
            y[:, part.start : part.stop] += used[:, None] * delta
        return (y if bias is None else y + bias.float()).to(x.dtype)


class FirstGroup(Layer):
    """A -1 of g_idx clamped to the first group."""

    def base(self, x, weight):
        if weight.g_idx is not None:
            weight = dataclasses.replace(weight, g_idx=weight.g_idx.clamp(min=0))
        return super().base(x, weight)


class Stepwise:
    """A backend that computes in the steps of a way, rounded once."""

    manifest = {"formats": ["int4", "nvfp4", "mxfp4"]}  # noqa: RUF012

    def __init__(self, way):
        self.way, self.earlier = way, {}

    def unpack(self, packed, size, *, dim=1):
        codes = self.answer("unpack", Operands(packed=packed, size=size, dim=dim))
        return codes.contiguous()  # else the layout alone would fail every way

    def dequantize(self, weight, dtype=None):
        dense = self.answer("dequantize", Operands(weight=weight, dtype=dtype))
        of_float4 = isinstance(weight, Float4Weight)
        return dense.to(dtype or (torch.bfloat16 if of_float4 else weight.scale.dtype))

    def from_gptq(self, qweight, qzeros, scales, g_idx=None, *, zero_plus_one=True):
        layout = GPTQTensors(qweight, qzeros, scales, g_idx)
        operands = Operands(layout=layout, zero_plus_one=zero_plus_one)
        return self.answer("from_gptq", operands).to(scales.dtype)

    def from_awq(self, qweight, qzeros, scales):
        operands = Operands(layout=AWQTensors(qweight, qzeros, scales))
        return self.answer("from_awq", operands).to(scales.dtype)

    def shrink(self, x, lora, adapter_ids):
        operands = Operands(x=x, lora=lora, adapter_ids=adapter_ids)
        return self.answer("shrink", operands).float()

    def expand(self, h, lora, adapter_ids):
        operands = Operands(h=h, lora=lora, adapter_ids=adapter_ids)
        return self.answer("expand", operands).float()

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        operands = Operands(x=x, weight=weight, lora=lora, adapter_ids=adapter_ids, bias=bias)
        return self.answer("int4_lora_linear", operands).to(x.dtype)

    def answer(self, function, operands):
        ids = operands.adapter_ids
        earlier = None if ids is None else self.earlier.get(len(ids))
        if ids is not None:
            self.earlier[len(ids)] = ids.clone()
        return answer_of(function, operands, self.way, Manifest(), earlier).exact


class OneRow(Layer):
    """One output in 4096 wrong by a hundredth."""

    def base(self, x, weight):
        y = super().base(x, weight)
        if y.shape[1] == 4096:
            y[:, 1234] *= 1.01
        return y


class OneToken(Layer):
    """One token in 4096 wrong by a hundredth."""

    def base(self, x, weight):
        y = super().base(x, weight)
        if y.shape[0] == 4096:
            y[3210] *= 1.01
        return y


class FourBounds:
    """An error of four bounds in one element."""

    def int4_linear(self, x, weight, bias=None):
        y = reference.int4_linear(x, weight, bias)
        if y.numel():
            bound = error_bound(x, weight, bias=bias)[-1, -1]
            y[-1, -1] = (y[-1, -1].double() + 4 * bound.nan_to_num(posinf=0.0)).to(y.dtype)
        return y


class Biased:
    """A tenth of the bound added to every element whose bound still holds."""

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        operands = (x, weight, lora, adapter_ids, bias)
        bound = error_bound(*operands).nan_to_num(posinf=0.0)
        exact = int4_lora_linear(x.double(), *operands[1:])
        moved, right = (exact + bound / 10).to(x.dtype), exact.to(x.dtype)
        return torch.where((moved.double() - exact).abs() <= bound, moved, right)


class Unwritten(Layer):
    """It never writes the last outputs."""

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        y = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype)
        done = weight.out_features - 3
        y[:, :done] = super().int4_lora_linear(x, weight, lora, adapter_ids, bias)[:, :done]
        return y


class Writes(Layer):
    """It scales x in place."""

    def base(self, x, weight):
        y = super().base(x, weight)
        x.mul_(0.5)
        return y


class Unsteady(Layer):
    """The order of the sums changes from call to call."""

    def __init__(self):
        self.calls = 0

    def base(self, x, weight):
        self.calls += 1
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(self.calls))
        return one_by_one(x.float()[:, order], dequantize(weight, torch.float32)[:, order])


class UnsteadyDeclared(Unsteady):
    """The same, declared."""

    manifest = Manifest(deterministic=False)


class Backwards(Layer):
    """float32 sums from the last product to the first."""

    def base(self, x, weight):
        return one_by_one(x.float().flip(1), dequantize(weight, torch.float32).flip(1))


class SplitSums(Layer):
    """float32 sums of blocks, added up in float32."""

    def base(self, x, weight):
        dense = dequantize(weight, torch.float32)
        parts = zip(x.float().split(64, dim=1), dense.split(64, dim=1), strict=True)
        return sum(x_part @ w_part.T for x_part, w_part in parts)


class Unrounded(Layer):
    """(q - z) * s in float32, without its rounding; declared."""

    manifest = Manifest(weight_rounded=False)

    def base(self, x, weight):
        dense = unrounded_weight(weight, torch.float32)
        return x.float() @ dense.T

    def dequantize(self, weight, dtype=None):
        dense = unrounded_weight(weight, torch.float32)
        return dense.to(dtype or weight.scale.dtype)


class BaseRounded(Layer):
    """The base in the dtype of x before the delta is added; declared."""

    manifest: ClassVar = {"base_rounded": True}

    def base(self, x, weight):
        return super().base(x, weight).to(x.dtype)


class HalfSumsDeclared(HalfSums):
    """Sums in float16, declared."""

    manifest: ClassVar = {"accumulate": "float16", "dtypes": ["float16"], "base_rounded": True}


class Prepared:
    """A backend that prepares its operands once, in its own format."""

    manifest = Manifest()

    def __init__(self):
        self.prepared = 0

    def prepare(self, weight):
        self.prepared += 1
        return {"weight": weight}

    def prepare_lora(self, lora):
        return {"lora": lora}

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        lora = None if lora is None else lora["lora"]
        return int4_lora_linear(x, weight["weight"], lora, adapter_ids, bias)


class EagerLow:
    """The yardstick itself."""

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        operands = Operands(x=x, weight=weight, lora=lora, adapter_ids=adapter_ids, bias=bias)
        return yardstick("int4_lora_linear", operands, Manifest())
