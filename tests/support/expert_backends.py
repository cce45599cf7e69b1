"""Backends of experts with faults, and correct ones that round elsewhere or in another order."""

import dataclasses

import torch
from torch.nn.functional import gelu, silu

import int4_lora.reference as reference
from int4_lora.reference import ExpertsLoRA, LoRAStack, dequantize
from int4_lora.reference.conformance import Manifest
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.judging.answers import answer
from int4_lora.reference.dequantization import unrounded_weight


class Fused:
    """Experts one after the other in float32, each step a method to override."""

    manifest = None

    def int4_moe(
        self,
        x,
        experts,
        topk_ids,
        topk_weights,
        lora=None,
        adapter_ids=None,
        activation="silu",
        weights_first=False,
    ):
        results = torch.zeros(*topk_ids.shape, experts.hidden)
        for expert in range(experts.count):
            tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
            p = topk_weights[tokens, slots, None].float()
            ids = None if adapter_ids is None else adapter_ids[tokens]
            chosen = x[tokens].float()
            chosen = self.step(p * chosen, x) if weights_first else chosen
            gate_up = self.layer(chosen, experts, lora, "gate_up", expert, ids, x)
            gate, up = gate_up.chunk(2, dim=1)
            act = silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")
            h = self.step(self.step(act, x) * up, x)
            h = h if weights_first else self.before_down(h, p)
            y = self.layer(h, experts, lora, "down", expert, ids, x)
            results[tokens, slots] = y if weights_first else self.after_down(y, p, x)
        return self.total(results, x).to(x.dtype)

    def layer(self, x, experts, lora, name, expert, ids, like):
        y = self.step(x @ self.dense(getattr(experts, name)[expert]).float().T, like)
        for part in () if lora is None else lora.slices(name, expert):
            for adapter in range(part.stack.adapters):
                rows = (ids == adapter).nonzero().flatten()
                h = self.step(x[rows] @ part.stack.a[adapter].float().T, like)
                delta = h @ part.stack.b[adapter].float().T * part.stack.scaling[adapter].float()
                changed = y[rows, part.start : part.stop] + self.step(delta, like)
                y[rows, part.start : part.stop] = self.step(changed, like)
        return y

    def dense(self, weight):
        return dequantize(weight)

    def step(self, y, x):
        return y

    def before_down(self, h, p):
        return h

    def after_down(self, y, p, x):
        return self.step(p * y, x)

    def total(self, results, x):
        return results.sum(dim=1)


class Backwards(Fused):
    """The last slot first."""

    def total(self, results, x):
        y = results[:, -1]
        for slot in range(results.shape[1] - 2, -1, -1):
            y = y + results[:, slot]
        return y


class IntoH(Fused):
    """Routed weights multiplied into h, after the activation."""

    def before_down(self, h, p):
        return p * h

    def after_down(self, y, p, x):
        return y


class Rounded(Fused):
    """Each step rounded to the dtype of x, as stock engines do."""

    manifest = {"steps_rounded": True}  # noqa: RUF012

    def step(self, y, x):
        return y.to(x.dtype).float()

    def total(self, results, x):
        y = torch.zeros_like(results[:, 0])
        for slot in range(results.shape[1]):
            y = self.step(y + results[:, slot], x)
        return y


class Unrounded(Fused):
    """Weights kept in float32."""

    manifest = {"weight_rounded": False}  # noqa: RUF012

    def dense(self, weight):
        return unrounded_weight(weight, torch.float32)


HONEST = ("Fused", "Backwards", "IntoH", "Rounded", "Unrounded")


class Changed:
    """The reference, called with other arguments."""

    def int4_moe(self, x, experts, topk_ids, topk_weights, lora=None, adapter_ids=None, **options):
        if lora is not None:
            lora = self.lora(lora, experts.count)
        routing = self.routing(topk_ids, topk_weights)
        return reference.int4_moe(x, experts, *routing, lora, adapter_ids, **options)

    def lora(self, lora, experts):
        return lora

    def routing(self, ids, weights):
        return ids, weights


class SharedOrder(Changed):
    """B of the pair that PEFT stores for all experts, split with the experts first."""

    def lora(self, lora, experts):
        layers = (lora.gate_up, lora.down)
        if any(not isinstance(entry, LoRAStack) for layer in layers for entry in layer or ()):
            return lora
        return ExpertsLoRA(*(None if layer is None else self.split(layer) for layer in layers))

    def split(self, stacks):
        changed = [stack.b.clone() for stack in stacks]
        for adapter in range(stacks[0].adapters):
            ranks = [int(stack.a[adapter].any(dim=1).sum()) for stack in stacks]
            rank, experts = max(ranks), len(stacks)
            stored = torch.stack([stack.b[adapter, :, :rank] for stack in stacks], dim=2)
            stored = stored.reshape(-1, rank * experts)  # as PEFT: column r * experts + e
            for expert in range(experts):
                changed[expert][adapter, :, :rank] = stored[:, expert * rank : (expert + 1) * rank]
        pairs = zip(stacks, changed, strict=True)
        return [dataclasses.replace(stack, b=b) for stack, b in pairs]


class Scattered(Changed):
    """A dense table of routing, in which the last of two slots with one expert is left."""

    def routing(self, ids, weights):
        kept = weights.clone()
        for token, row in enumerate(ids.tolist()):
            for slot, expert in enumerate(row):
                if expert in row[slot + 1 :]:
                    kept[token, slot] = 0.0
        return ids, kept


class DroppedDown(Changed):
    """Adapters of down left out, as by experts that add them to w13 only."""

    def lora(self, lora, experts):
        return ExpertsLoRA(lora.gate_up, [None] * experts)


class Mistaken:
    """Experts of mistakes of the diagnosis, one made after the other."""

    def __init__(self, mistakes):
        self.mistakes, self.earlier = mistakes, {}

    def int4_moe(self, x, experts, topk_ids, topk_weights, lora=None, adapter_ids=None, **options):
        operands = Operands(
            x=x,
            experts=experts,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            experts_lora=lora,
            adapter_ids=adapter_ids,
            **options,
        )
        earlier = self.earlier.get(len(x))
        if adapter_ids is not None:
            self.earlier[len(x)] = adapter_ids.clone()
        for mistake in self.mistakes:
            operands = mistake.change(operands, earlier) or operands
        return answer("int4_moe", operands, Manifest()).exact.to(x.dtype)


FAULTS = {
    "SharedOrder": "shared_order",
    "Scattered": "repeated_expert_once",
    "DroppedDown": "expert_adapters_dropped",
}
