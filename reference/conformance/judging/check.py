"""One judge for every result: the exact answer, the yardstick and the verdict, put together.

The conformance suite, the plug-in's check of each layer, the demo and the benchmarks call it, so
that no tolerance is written anywhere else.

Source: ``docs/conformance.md``, "The verdict".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from int4_lora.reference import (
    ExpertsLoRA,
    ExpertsWeight,
    LoRASlice,
    LoRAStack,
    PackedWeight,
    pack,
)
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.judging.answers import Answer, answer
from int4_lora.reference.conformance.judging.verdict import (
    Finding,
    judge,
    plain_tensor,
    rms_rule,
)
from int4_lora.reference.conformance.judging.yardstick import (
    ORDERS,
    largest_rms,
    yardstick,
    yardstick_rms,
)
from int4_lora.reference.conformance.manifest import Manifest
from int4_lora.reference.float4_weight import BaseWeight
from int4_lora.reference.moe import Activation

__all__ = [
    "answer_on_cpu",
    "check_addition",
    "check_call",
    "check_experts",
    "check_linear",
    "one_thread",
]


def check_linear(
    y: object,
    x: Tensor,
    weight: BaseWeight,
    lora: LoRAStack | Sequence[LoRASlice] | None = None,
    adapter_ids: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    weight_rounded: bool,
    base_rounded: bool,
    delta_rounded: bool = False,
) -> Finding | None:
    """Judge a result of ``int4_lora_linear``: form, classes, bound and rms error.

    The rms rule needs 512 elements that have a bound. To judge a layer at one token, call it with
    several x, and judge all results together.

    Args:
        y: the result, ``[tokens, out_features]`` in the dtype of x if it is right.
        x: ``[tokens, in_features]``, where the layer had it: on CUDA the bound allows for tensor
            cores.
        weight: the packed base weight, INT4 or FP4.
        lora: adapters, slices, or None.
        adapter_ids: ``[tokens]``, or None without adapters.
        bias: ``[out_features]``, or None.
        weight_rounded: whether the layer rounds (q - z) * s to the scale's dtype before use.
        base_rounded: whether it rounds the base to the dtype of x before bias or delta is added.
        delta_rounded: whether it rounds x A^T, B multiplied by the scaling, and the delta to the
            dtype of x.

    Returns:
        What is wrong, with a sentence in ``message``, or None.

    Raises:
        TypeError: an operand of the wrong type or dtype.
        ValueError: an operand whose shape, value or device does not fit.

    Example:
        >>> from int4_lora.reference import int4_linear, quantize
        >>> weight, x = quantize(torch.eye(64), group_size=32), torch.ones(8, 64)
        >>> check_linear(int4_linear(x, weight), x, weight, weight_rounded=True, base_rounded=False)
        >>> check_linear(x + 1, x, weight, weight_rounded=True, base_rounded=False).rule
        'bound'
    """
    operands = Operands(x=x, weight=weight, lora=lora, adapter_ids=adapter_ids, bias=bias)
    manifest = Manifest(
        weight_rounded=weight_rounded, base_rounded=base_rounded, delta_rounded=delta_rounded
    )
    return check_call("int4_lora_linear", operands, y, manifest)


def check_addition(
    y: object,
    base: Tensor,
    x: Tensor,
    lora: LoRAStack | Sequence[LoRASlice],
    adapter_ids: Tensor,
) -> Finding | None:
    """Judge adapters added to the outputs of a base layer: ``RN_x(base + delta)``.

    The bound is that of the delta alone, rounded to the dtype of x, plus twice the rounding of the
    sum. For a wide layer, judge some outputs: y and base at those columns, and the slices that
    ``lora_stack.rows_of`` returns for them.

    Args:
        y: the result, of the shape and dtype of ``base`` if it is right.
        base: ``[tokens, out_features]``, in the dtype of x.
        x: ``[tokens, in_features]``.
        lora: adapters or slices.
        adapter_ids: ``[tokens]``.

    Returns:
        What is wrong, or None.

    Raises:
        TypeError: an operand of the wrong type or dtype.
        ValueError: an operand whose shape, value or device does not fit.
    """
    outputs, in_features = base.shape[1], x.shape[1]
    codes = torch.zeros(outputs, in_features, dtype=torch.int8, device=x.device)
    scale = torch.ones(outputs, 1, device=x.device)
    no_base = PackedWeight(pack(codes), scale, shape=(outputs, in_features))
    operands = Operands(x=x, weight=no_base, lora=lora, adapter_ids=adapter_ids)
    manifest = Manifest(base_rounded=True)
    delta = answer_on_cpu("int4_lora_linear", operands, manifest)
    added_to = base.to("cpu").double()
    exact = added_to + delta.exact
    last_rounding = exact.abs() * torch.finfo(x.dtype).eps
    held = Answer(exact, x.dtype, delta.bound + last_rounding, (exact,))
    wide = dataclasses.replace(operands, x=x.to(manifest.sums_of(x))).to("cpu")
    deltas = [yardstick("int4_lora_linear", wide, manifest, order) for order in ORDERS]
    rms = largest_rms([(added_to + computed).to(x.dtype) for computed in deltas], held)
    return _judge_on_cpu(y, x.device, held, equal=False, yardstick=rms)


def check_experts(
    y: object,
    x: Tensor,
    experts: ExpertsWeight,
    topk_ids: Tensor,
    topk_weights: Tensor,
    lora: ExpertsLoRA | None = None,
    adapter_ids: Tensor | None = None,
    *,
    activation: Activation = "silu",
    weights_first: bool = False,
    weight_rounded: bool,
    steps_rounded: bool,
) -> Finding | None:
    """Judge a result of ``int4_moe``: form, classes, bound and rms error.

    Args:
        y: the result, ``[tokens, hidden]`` in the dtype of x if it is right.
        x: ``[tokens, hidden]``.
        experts: the weights of all experts; those that no token uses are not read.
        topk_ids: ``[tokens, k]``.
        topk_weights: ``[tokens, k]``.
        lora: the adapters of the experts, or None.
        adapter_ids: ``[tokens]``, or None without adapters.
        activation: as in ``int4_moe``.
        weights_first: as in ``int4_moe``.
        weight_rounded: whether (q - z) * s is rounded to the scale's dtype before use.
        steps_rounded: whether the results of an expert's steps are rounded to the dtype of x.

    Returns:
        What is wrong, with a sentence in ``message``, or None.

    Raises:
        TypeError: an operand of the wrong type or dtype.
        ValueError: an operand whose shape, value or device does not fit.

    Example:
        >>> from int4_lora.reference import int4_moe, quantize
        >>> gate_up, down = (quantize(torch.ones(shape)) for shape in ((256, 128), (128, 128)))
        >>> experts, x = ExpertsWeight([gate_up], [down]), torch.ones(4, 128) / 128
        >>> routing = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
        >>> y = int4_moe(x, experts, *routing)
        >>> flags = {"weight_rounded": True, "steps_rounded": False}
        >>> check_experts(y, x, experts, *routing, **flags)
        >>> check_experts(2 * y, x, experts, *routing, **flags).rule
        'bound'
    """
    operands = Operands(
        x=x,
        experts=experts,
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        experts_lora=lora,
        adapter_ids=adapter_ids,
        activation=activation,
        weights_first=weights_first,
    )
    manifest = Manifest(weight_rounded=weight_rounded, steps_rounded=steps_rounded)
    return check_call("int4_moe", operands, y, manifest)


def check_call(
    function: str, operands: Operands, result: object, manifest: Manifest, *, equal: bool = False
) -> Finding | None:
    """Judge the result of a backend's function.

    Args:
        function: a name of ``FUNCTIONS``.
        operands: its arguments.
        result: what it returned.
        manifest: the roundings that the backend declares.
        equal: whether the exact answer is demanded.

    Returns:
        The first finding against the result, or None.
    """
    held = answer_on_cpu(function, operands, manifest)
    finding = _judge_on_cpu(result, operands.device, held, equal=equal, yardstick=None)
    if finding is not None or equal or not isinstance(result, Tensor):
        return finding
    rms = yardstick_rms(function, operands, manifest, held)  # takes longer than all other rules
    return rms_rule(result.detach().to("cpu"), held, rms)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread inside the context, and afterwards on as many as before.

    The suite's products are many and small: threads would only wait for one another, for a long
    time on a busy machine. Backends are called outside it.

    Example:
        >>> with one_thread():
        ...     torch.get_num_threads()
        1
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)  # a backend may have turned it on
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def answer_on_cpu(function: str, operands: Operands, manifest: Manifest) -> Answer:
    """Return the answer of a call, on the CPU, where results of every device are judged.

    For operands on CUDA the bound is computed there, so that it allows for tensor cores.
    """
    known = operands if operands.device.type == "cuda" else operands.to("cpu")
    return answer(function, known, manifest).to_cpu()


def _judge_on_cpu(
    result: object, device: torch.device, held: Answer, *, equal: bool, yardstick: float | None
) -> Finding | None:
    unusual = plain_tensor(result)
    if unusual is not None or not isinstance(result, Tensor):
        return unusual
    if result.device != device:
        return Finding("form", f"returned on {result.device}, not on {device}")
    return judge(result.detach().to("cpu"), held, equal=equal, yardstick=yardstick)
