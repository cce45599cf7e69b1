"""Keep the quantised linears and experts of a transformers model packed, computed by ``compiled``.

transformers loads linears packed, and makes the whole model dense in its first forward. Here each
of them becomes an ``Int4Linear`` before that, and the experts that transformers 5 fuses become
``Int4Experts``. The scales are read from the checkpoint again, because
transformers casts them to the dtype of the model.

Source: ``ModelCompressor.add_decompress_hook`` of compressed-tensors.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.safetensors_files import DTYPES
from int4_lora.integration.huggingface.checkpoint_of_model import checkpoint_of
from int4_lora.integration.huggingface.dense_experts import dense_conversions
from int4_lora.integration.huggingface.dense_record import DenseRecord
from int4_lora.integration.huggingface.fused_experts import (
    FusedExperts,
    LeftOutExperts,
    fused_experts,
)
from int4_lora.integration.huggingface.hooks import carry_hooks
from int4_lora.integration.huggingface.int4_experts import Int4Experts
from int4_lora.integration.huggingface.int4_linear import Int4Linear
from int4_lora.integration.huggingface.keep_experts import check_same, int4_experts, names_of
from int4_lora.integration.huggingface.mapped_files import MappedFile, is_mapped, mapped_files
from int4_lora.integration.huggingface.quantised_modules import (
    DENSE,
    Findings,
    describe,
    quantised_modules,
    sort_modules,
)
from int4_lora.integration.huggingface.registration import register
from int4_lora.reference.float4_weight import BaseWeight

__all__ = ["keep_packed"]

Model = TypeVar("Model", bound=nn.Module)
WHEN = (
    "call keep_packed after from_pretrained and before the first forward, and load without "
    "dequantize=True or run_compressed=False"
)


def keep_packed(model: Model, checkpoint: str | os.PathLike[str] | None = None) -> Model:
    """Replace quantised linears, and experts of INT4, by layers that stay packed.

    Call it after ``from_pretrained`` and before the first forward, which makes the model dense. The
    checkpoint's tensors are held once, frozen; the model's own copies of them are freed. A second
    call changes nothing; after a call that was interrupted it replaces the rest.

    ``from_pretrained`` of transformers 5 has made experts dense. They are read from the checkpoint
    again; ``load_packed`` never makes them dense.

    A warning names every quantised module that stays as it is, with the reason: layers of another
    format such as FP8, and experts whose class computes something else.

    Args:
        model: a quantised model of transformers; it is changed in place.
        checkpoint: the folder of its checkpoint, or its name on the hub; None for the place that
            the model was loaded from.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: the checkpoint is not there.
        ValueError: the model has no INT4 layers, or they are dense already, or offloaded; or the
            checkpoint is not the model's. The model is then unchanged.

    Example:
        >>> from transformers import AutoModelForCausalLM  # doctest: +SKIP
        >>> model = AutoModelForCausalLM.from_pretrained("my-model-W4A16")  # doctest: +SKIP
        >>> model = keep_packed(model)  # doctest: +SKIP

    Source:
        ``CompressedTensorsHfQuantizer`` of transformers.
    """
    kept = [module for module in model.modules() if isinstance(module, Int4Linear | Int4Experts)]
    found = quantised_modules(model)
    if kept and not _has_more(model, found):
        _remove_decompression(model, found)
        return model
    if not found and getattr(getattr(model, "config", None), "quantization_config", None) is None:
        raise ValueError("the model has no layer that compressed-tensors quantised")
    source = checkpoint_of(model, checkpoint)
    experts, refused = fused_experts(model, source)
    findings = sort_modules(found, source, experts, refused)
    if kept and not findings.packed and not experts:
        return model
    _check(findings, experts)
    register()
    stored = findings.packed
    files = mapped_files()
    weights = {name: _weight(source, found[name], name, stored[name], files) for name in stored}
    for fused in experts:
        check_same(source, fused)
    places, dtype = _places(model), getattr(model, "dtype", None)
    record = next((layer.record for layer in kept if layer.record is not None), None)
    if record is None:
        config, others = getattr(model, "config", None), len(found) > len(stored)
        named = {name: full for fused in experts for name, full in names_of(fused)}
        record = DenseRecord(config, {**stored, **named}, others=others)
    for name in stored:
        module = found.pop(name)
        weight = _read(source, stored[name], weights.pop(name), files)
        layer = _linear(source, stored[name], module, weight, dtype)
        layer.name, layer.record = name, record
        for parent, attribute in places.pop(module):
            setattr(parent, attribute, layer)
    for fused in experts:
        reason = _keep_experts(model, source, fused, record, places)
        if reason is not None:
            findings.left[fused.names.owner] = reason
    if experts:
        dense_conversions(model)
    _remove_decompression(model, found)
    packed = set(record.stored.values())  # also those that an interrupted call replaced
    left = {name: reason for name, reason in findings.left.items() if name not in packed}
    left |= dict.fromkeys(findings.dense, DENSE)
    if left:
        warnings.warn(f"these quantised modules stay as they are:\n{describe(left)}", stacklevel=2)
    return model


def _has_more(model: nn.Module, found: Mapping[str, nn.Module]) -> bool:
    """Return whether layers are left that can still be kept packed."""
    return any("weight_packed" in module._parameters for module in found.values()) or any(
        isinstance(module, LeftOutExperts) for module in model.modules()
    )


def _keep_experts(
    model: nn.Module,
    checkpoint: Checkpoint,
    fused: FusedExperts,
    record: DenseRecord,
    places: dict[nn.Module, list[tuple[nn.Module, str]]],
) -> str | None:
    """Put packed experts in place of transformers' module; return why they stay dense, or None.

    Raises:
        ValueError: experts that were not loaded cannot be held; the message says why.
    """
    try:
        experts = int4_experts(checkpoint, fused, _device_of(model, fused))
    except ValueError as error:
        if isinstance(fused.module, LeftOutExperts):
            raise
        return str(error)
    experts.name, experts.record = fused.name, record
    for parent, attribute in places.pop(fused.module):
        setattr(parent, attribute, experts)
    return None


def _device_of(model: nn.Module, experts: FusedExperts) -> torch.device:
    """Return the device of a layer's experts: that of what lies beside them, if they were left out.

    Raises:
        ValueError: it is the meta device.
    """
    around = model.get_submodule(experts.name.rpartition(".")[0])
    device = next(around.parameters(), torch.empty(0)).device
    if device.type == "meta":
        raise ValueError(f"{experts.name} must be on a device that computes, got {device}")
    return device


def _check(findings: Findings, experts: Sequence[FusedExperts]) -> None:
    """Check that there is something to keep, and that all of it can be kept."""
    if findings.offloaded:
        names = dict.fromkeys(
            findings.offloaded, "its tensors are on the meta device: it is offloaded or not loaded"
        )
        raise ValueError(
            f"INT4 layers must be on a device that computes:\n{describe(names)}\nLoad the model "
            "with its weights, and with a device_map that has no 'cpu' beside a GPU and no 'disk'"
        )
    if findings.packed or experts:
        return
    if findings.dense:
        raise ValueError(
            f"every INT4 layer of the model is dense already ({len(findings.dense)} of "
            f"{len(findings.dense)}): {WHEN}"
        )
    raise ValueError(f"no layer of the model can stay packed:\n{describe(findings.left)}")


def _weight(
    checkpoint: Checkpoint, module: nn.Module, name: str, stored: str, files: list[MappedFile]
) -> BaseWeight:
    """Return a module's tensors: its own codes, and all others from the checkpoint's file.

    Raises:
        ValueError: the codes are not the checkpoint's.
    """
    words = module.get_parameter("weight_packed").detach()
    weight = checkpoint.weight(stored).to(words.device)
    full = checkpoint.stored(stored)[0]
    place = checkpoint.tensors[full]
    mapped = checkpoint.is_stored_as_read(stored) and is_mapped(words, place, files)
    if not mapped and not torch.equal(weight.packed, words):
        raise ValueError(
            f"{place.file}: {full} differs from the model's {name}.weight_packed: "
            "the model was loaded from another checkpoint"
        )
    return dataclasses.replace(weight, packed=words)


def _read(
    checkpoint: Checkpoint, stored: str, weight: BaseWeight, files: list[MappedFile]
) -> BaseWeight:
    """Return a weight whose codes are in memory of their own.

    Codes that are a mapped file's are read from the file: pages of the mapping that are read stay
    in memory for as long as the model's other tensors are views of it.
    """
    name = f"{stored}.weight_packed"
    if not checkpoint.is_stored_as_read(stored):  # converted: no file has these words
        return weight
    if not is_mapped(weight.packed, checkpoint.tensors[name], files):
        return weight
    return dataclasses.replace(weight, packed=checkpoint.tensor(name))


def _linear(
    checkpoint: Checkpoint,
    stored: str,
    module: nn.Module,
    weight: BaseWeight,
    dtype: torch.dtype | None,
) -> Int4Linear:
    """Return the packed layer for a module, with its bias, its mode and its hooks."""
    shape = checkpoint.tensors.get(f"{stored}.weight_shape")
    shape_dtype = None if shape is None else DTYPES.get(shape.dtype, torch.int64)
    if not checkpoint.is_stored_as_read(stored):
        shape_dtype = torch.int64
    scale = f"{stored}.{checkpoint.layout(stored).scale}"
    if checkpoint.is_float4(stored):  # of its scales only the global one can be a scalar
        scale = f"{stored}.weight_global_scale"
    else:
        dtype = module.get_parameter("weight_scale").dtype
    layer = Int4Linear(
        weight,
        module._parameters.get("bias"),
        dtype=dtype,
        shape_dtype=shape_dtype,
        scalars=scale in checkpoint.tensors and not checkpoint.tensors[scale].shape,
    )
    layer.train(module.training)
    carry_hooks(module, layer)
    return layer


def _places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Return where each module is: the modules that have it, and their attribute for it."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, attribute))
    return places


def _is_compressed(module: nn.Module) -> bool:
    """Return whether compressed-tensors still has to decompress a module."""
    status = getattr(module, "quantization_status", None)
    return getattr(status, "value", None) == "compressed"


def _remove_decompression(model: nn.Module, others: Mapping[str, nn.Module]) -> None:
    """Remove the hook that makes the model dense in its first forward, unless others need it."""
    if any(_is_compressed(module) for module in others.values()):
        return
    for module in model.modules():
        hook = module.__dict__.pop("ct_decompress_hook", None)
        if hook is not None:
            hook.remove()
