"""Find the experts that transformers 5 fuses, and keep it from making them dense.

transformers 5 has no linears for experts. It dequantises those of an INT4 checkpoint while it loads
them, and stacks them in two parameters of one module. ``experts_left_out`` takes that module out of
the model before its weights are loaded, so that no dense experts ever exist; ``keep_packed`` then
reads them from the checkpoint.

A class of experts may be replaced if it computes ``int4_moe``. Whether it does is tried on a few
numbers, with random experts of its own: classes of experts whose gate is clamped, interleaved with
up, or has a bias, differ in their results.

Source: ``CompressedTensorsHfQuantizer`` and ``use_experts_implementation`` of transformers 5.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor, nn

from int4_lora.integration.checkpoint.experts import ExpertNames, experts_of, stored_experts
from int4_lora.integration.checkpoint.layouts import INT_QUANTIZED
from int4_lora.integration.checkpoint.open import Checkpoint, open_checkpoint
from int4_lora.integration.checkpoint.spellings import spellings
from int4_lora.integration.huggingface.dense_experts import of_dense_experts
from int4_lora.integration.huggingface.int4_experts import DOWN, GATE_UP
from int4_lora.reference.moe import Activation, activated

__all__ = ["FusedExperts", "LeftOutExperts", "activation_of", "experts_left_out", "fused_experts"]

RENAMED = {".block_sparse_moe.experts": ".mlp.experts"}  # by transformers 5, of Mixtral's family
OTHER_FORMULA = "its class does not compute down(act(gate(x)) * up(x)) with SiLU or GELU by tanh"
NOT_PACKED = "experts are kept packed where all of them are pack-quantized, without activations"
_LOCK = threading.RLock()  # the method that is replaced is the whole process's


@dataclass(frozen=True)
class FusedExperts:
    """The experts of a layer that transformers fuses.

    Args:
        name: the name of the module in the model.
        module: transformers' module, or a ``LeftOutExperts`` in its place.
        names: the experts in the checkpoint.
        activation: the activation of the module.
    """

    name: str
    module: nn.Module
    names: ExpertNames
    activation: Activation


class LeftOutExperts(nn.Module):
    """What stands for experts between loading a model and ``keep_packed``.

    Args:
        dense: transformers' module, whose parameters are removed.
    """

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.__dict__["_dense"] = dense  # no submodule
        self.dtype: torch.dtype = dense.get_parameter(DOWN).dtype
        for name in (GATE_UP, DOWN):
            del dense._parameters[name]

    @property
    def dense(self) -> nn.Module:
        """The module of transformers, without its parameters."""
        module: nn.Module = self.__dict__["_dense"]
        return module

    def forward(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse to compute.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("the experts of this model were not loaded: load it by load_packed")


def fused_experts(
    model: nn.Module, checkpoint: Checkpoint
) -> tuple[list[FusedExperts], dict[str, str]]:
    """Return the experts of a model that can stay packed, and why others cannot.

    Args:
        model: a model of transformers.
        checkpoint: its checkpoint.

    Returns:
        The experts; and the reasons, by the checkpoint's name of a module that holds experts.

    Raises:
        ValueError: experts were left out that cannot stay packed; the message says why.
    """
    modules = {name: module for name, module in model.named_modules() if _is_fused(module)}
    found, refused = [], {}
    for owner, names in experts_of(checkpoint.modules()).items():
        name = next((one for one in _names_in_model(owner) if one in modules), None)
        if name is None:
            continue
        module = modules[name]
        try:
            stored = stored_experts(names)[owner]
            activation = _activation_or_refusal(module, checkpoint, stored)
        except ValueError as error:
            if isinstance(module, LeftOutExperts):
                raise
            refused[owner] = str(error)
        else:
            found.append(FusedExperts(name, module, stored, activation))
    return found, refused


@contextlib.contextmanager
def experts_left_out(checkpoint: Checkpoint | None = None) -> Iterator[None]:
    """Leave experts that can stay packed out of the models that are loaded while it lasts.

    Dense experts beside them are loaded, although transformers 5 looks for packed ones in every
    layer. Where transformers has a linear for each projection of each expert, nothing changes.

    Args:
        checkpoint: the checkpoint that is loaded; None for the one whose files transformers finds.

    Example:
        >>> with experts_left_out():  # doctest: +SKIP
        ...     model = AutoModelForCausalLM.from_pretrained("my-moe-W4A16")
        >>> model = keep_packed(model)  # doctest: +SKIP
    """
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    quantizer: Any = CompressedTensorsHfQuantizer
    process = quantizer._process_model_before_weight_loading
    convert = getattr(quantizer, "update_weight_conversions", None)  # transformers 4 has none

    @functools.wraps(process)
    def without_experts(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = process(self, model, *args, **kwargs)
        if any(_is_fused(module) for module in model.modules()):
            with torch.device("cpu"):  # transformers makes the model on the meta device
                source = checkpoint or _checkpoint_of(kwargs.get("checkpoint_files"))
                if source is not None:
                    _leave_out(model, source)
        return result

    def with_dense_experts(self: Any, conversions: Any, *model: Any) -> Any:
        """Put those of dense experts first: from 5.23 on, the others match their names, too."""
        assert convert is not None
        return [*of_dense_experts(conversions), *convert(self, conversions, *model)]

    with _LOCK, contextlib.ExitStack() as replaced:
        before = _replaced(quantizer, "_process_model_before_weight_loading", without_experts)
        replaced.enter_context(before)
        if convert is not None:
            changed = _replaced(quantizer, "update_weight_conversions", with_dense_experts)
            replaced.enter_context(changed)
        yield


@contextlib.contextmanager
def _replaced(kind: Any, name: str, method: Any) -> Iterator[None]:
    """Let a class have another method while the context lasts."""
    original = getattr(kind, name)
    setattr(kind, name, method)
    try:
        yield
    finally:
        setattr(kind, name, original)


def activation_of(module: nn.Module) -> Activation | None:
    """Return the activation with which a module of experts computes ``int4_moe``, or None.

    Args:
        module: a module of transformers that holds ``gate_up_proj`` and ``down_proj``, or held
            them.
    """
    generator = torch.Generator().manual_seed(0)
    experts, tokens, hidden, inter = 3, 6, 8, 4

    def numbers(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return 3 * values  # beyond the limits of classes that clamp

    gate_up, down = numbers(experts, 2 * inter, hidden), numbers(experts, hidden, inter)
    x, p = numbers(tokens, hidden), numbers(tokens, 2)
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1]], device="cpu")
    small = _small_copy(module, experts, {GATE_UP: gate_up, DOWN: down})
    try:
        with torch.no_grad():
            given = small(x, ids, p)
    except Exception:  # a class with other arguments or attributes may raise any
        return None
    for activation in get_args(Activation):
        gate, up = torch.einsum("th,tkih->tki", x, gate_up[ids]).chunk(2, dim=2)
        h = activated(gate, activation) * up
        expected = torch.einsum("tk,tki,tkhi->th", p, h, down[ids])
        same_form = isinstance(given, Tensor) and given.shape == expected.shape
        if same_form and (given - expected).abs().max() <= 1e-9 * expected.abs().max():
            return activation  # type: ignore[no-any-return]
    return None


def _small_copy(module: nn.Module, experts: int, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a module with a few experts of its own, computed eagerly."""
    small: nn.Module = object.__new__(type(module))
    small.__dict__.update(module.__dict__)
    small.__dict__["_parameters"] = {
        name: nn.Parameter(tensor, requires_grad=False) for name, tensor in parameters.items()
    }
    small.__dict__["num_experts"] = experts
    config = getattr(module, "config", None)
    if config is not None:
        config = copy.copy(config)
        config.__dict__["_experts_implementation_internal"] = "eager"
        small.__dict__["config"] = config
    return small


def _is_fused(module: nn.Module) -> bool:
    """Return whether a module holds the experts of a layer in two parameters, or held them."""
    if isinstance(module, LeftOutExperts):
        return True
    held = (module._parameters.get(name) for name in (GATE_UP, DOWN))
    return all(parameter is not None and parameter.ndim == 3 for parameter in held)


def _activation_or_refusal(
    module: nn.Module, checkpoint: Checkpoint, names: ExpertNames
) -> Activation:
    """Return the activation of experts that can stay packed.

    Raises:
        ValueError: they cannot; the message says why.
    """
    for name in names.all():
        if not checkpoint.is_packed(name) or checkpoint.layout(name) is INT_QUANTIZED:
            scheme = checkpoint.schemes[name]
            form = f"{scheme.format} ({scheme.kind}, {scheme.bits} bits)"
            raise ValueError(f"{NOT_PACKED}; {name} is {form}")
        if checkpoint.schemes[name].activations:
            raise ValueError(f"{NOT_PACKED}; activations of {name} are quantised, too")
    dense = module.dense if isinstance(module, LeftOutExperts) else module
    shape = (names.count, *checkpoint.shape_of(names.of(0)[2]))
    if not isinstance(module, LeftOutExperts) and tuple(module.get_parameter(DOWN).shape) != shape:
        held = list(module.get_parameter(DOWN).shape)
        raise ValueError(f"{DOWN} of the model is {held}, that of the checkpoint {list(shape)}")
    activation = activation_of(dense)
    if activation is None:
        raise ValueError(f"{OTHER_FORMULA}: {type(dense).__name__}")
    return activation


def _names_in_model(owner: str) -> Iterator[str]:
    """Yield the names that a module of the checkpoint may have in the model."""
    for name in spellings(owner):
        yield name
        for stored, renamed in RENAMED.items():
            if stored in name:
                yield name.replace(stored, renamed)


def _checkpoint_of(files: Any) -> Checkpoint | None:
    """Return the checkpoint that some of transformers' files belong to, or None."""
    return open_checkpoint(Path(files[0]).parent) if files else None


def _leave_out(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put ``LeftOutExperts`` in place of the experts that can stay packed."""
    for experts in fused_experts(model, checkpoint)[0]:
        parent, _, child = experts.name.rpartition(".")
        setattr(model.get_submodule(parent), child, LeftOutExperts(experts.module))
        unexpected: Any = model._keys_to_ignore_on_load_unexpected  # else transformers warns
        names = {experts.name, experts.names.owner}
        model._keys_to_ignore_on_load_unexpected = {  # type: ignore[assignment]
            *(unexpected or ()),
            *(rf"(^|\.){re.escape(name)}\." for name in names),
        }
