"""Write a LoRA adapter as a folder that PEFT and serving engines load.

Source: ``peft/utils/save_and_load.py``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from int4_lora.atomic_files import new_folder
from int4_lora.integration.adapter.adapter import FLOATS, Adapter, AdapterModule
from int4_lora.integration.adapter.embeddings import EMBEDDINGS
from int4_lora.integration.adapter.expert_forms import (
    Experts,
    fused_experts,
    named_experts,
    owner_of,
    separate_experts,
)
from int4_lora.integration.adapter.experts import GATE_UP, INNER
from int4_lora.integration.adapter.files import CONFIG_FILE, TENSOR_FILE
from int4_lora.integration.adapter.int4_form import Int4Form, int4_config, int4_tensors
from int4_lora.integration.adapter.read import read_adapter

__all__ = ["write_adapter", "write_folder"]

PREFIX = "base_model.model."


def write_adapter(
    path: str | os.PathLike[str],
    modules: Mapping[str, AdapterModule],
    *,
    base_model: str | None = None,
    experts: Experts | None = None,
    bits: int | None = None,
    group_size: int = 128,
    symmetric: bool = True,
) -> Adapter:
    """Write an adapter in PEFT's folder format; ``read_adapter`` reads the same adapter back.

    ``read_adapter`` returns the tensors bit for bit. It also returns every scaling exactly, if for
    all layers the scaling is alpha / rank for some float64 alpha, or if for all layers it is
    alpha / sqrt(rank), with ``use_rslora``. Otherwise the alphas are those for alpha / rank, and a
    scaling that is not alpha / rank changes by at most a relative 2^-52.

    The most frequent rank and alpha become ``r`` and ``lora_alpha``; layers that differ are listed
    in ``rank_pattern`` and ``alpha_pattern``. The folder is written under a temporary name and then
    renamed, so that ``path`` is complete if it exists.

    The pair of an embedding is written as PEFT's ``lora_embedding_A`` and ``lora_embedding_B``.
    Experts (``experts.<number>.<projection>``) are written in the form of their names: if they have
    ``gate_up_proj``, as one pair for all of them (``target_parameters``), which PEFT reads where
    the model holds them as one parameter; else as a pair for each, which vLLM reads for most
    models. PEFT 0.21 on transformers 5 reads the latter if every expert has a pair of the same
    rank. ``experts`` chooses; what is read back then has the names of that form, and adds the same
    to the weights.

    With ``bits=4`` A and B are quantised, and stored as compressed-tensors stores weights; pairs of
    embeddings stay floats. The adapter read back is then that of the dequantised matrices. PEFT and
    vLLM refuse such a folder; ``int4-lora adapter dequantize`` writes it for them.

    Args:
        path: the folder to write; it must not exist.
        modules: the pair of each layer, by the layer's name in the base model.
        base_model: the name or path of the base, recorded in the config.
        experts: "separate" splits ``gate_up_proj`` into ``gate_proj`` (the first half of the rows)
            and ``up_proj``; "fused" joins them; None keeps the form of the names.
        bits: 4 to write the pairs of linear layers in INT4; None for floats.
        group_size: with ``bits=4``, the columns of A or B that share a scale; a matrix with no more
            columns has one group per row.
        symmetric: with ``bits=4``, whether all zero-points are 0.

    Returns:
        The adapter, read back.

    Raises:
        FileExistsError: ``path`` exists.
        TypeError: a tensor has the wrong dtype, or a scaling is not a number.
        ValueError: there are no modules, shapes contradict each other, a scaling is not finite,
            the pairs of experts do not have the form, ``bits`` is neither None nor 4, or a matrix
            cannot be quantised in these groups; the message names the module.

    Example:
        >>> import tempfile, torch
        >>> from int4_lora.integration import AdapterModule
        >>> q_proj = AdapterModule(torch.ones(2, 8), torch.ones(4, 2), scaling=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     adapter = write_adapter(f"{folder}/mine", {"model.q_proj": q_proj})
        >>> adapter.config["r"], adapter.config["lora_alpha"]
        (2, 1)

    Source:
        ``peft/tuners/lora/config.py``.
    """
    folder = Path(path)
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} is there already")
    if not modules:
        raise ValueError("modules must not be empty")
    if bits is not None and (type(bits) is not int or bits != 4):
        raise ValueError(f"bits must be 4 or None, got {bits!r}")
    for name, module in modules.items():
        _check(name, module)
    forms = _forms(modules, experts)
    config = _config(forms, base_model)
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in forms.tensors()}
    if bits is not None:
        form = Int4Form(group_size, symmetric)
        config, tensors = int4_config(config, form), int4_tensors(tensors, form)
    return write_folder(folder, config, tensors)


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """Write an adapter's config and tensors to a new folder, and read it.

    Args:
        folder: the folder, which does not exist.
        config: the content of ``adapter_config.json``.
        tensors: the tensors of ``adapter_model.safetensors``.

    Raises:
        TypeError: what was written cannot be read, for a dtype; ``folder`` is then not made.
        ValueError: what was written cannot be read; ``folder`` is then not made.
    """
    with new_folder(folder) as made:
        (made / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(dict(tensors), made / TENSOR_FILE, metadata={"format": "pt"})
        read_adapter(made)  # raises any error before the folder is renamed
    return read_adapter(folder)


def _check(name: str, module: AdapterModule) -> None:
    """Check one layer before anything is written."""
    for matrix, tensor in (("a", module.a), ("b", module.b)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(f"{name}: {matrix} must be a float tensor, got {kind}")
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise ValueError(f"{name}: {matrix} must be 2-D and not empty, got {[*tensor.shape]}")
    if module.a.dtype != module.b.dtype:
        dtypes = f"{module.a.dtype} and {module.b.dtype}"
        raise TypeError(f"{name}: a and b must have one dtype, got {dtypes}")
    if module.a.shape[0] != module.b.shape[1]:
        shapes = f"{list(module.a.shape)} and {list(module.b.shape)}"
        raise ValueError(f"{name}: a must be [rank, in] and b [out, rank], got {shapes}")
    if isinstance(module.scaling, bool) or not isinstance(module.scaling, (int, float)):
        raise TypeError(f"{name}: scaling must be a number, got {type(module.scaling).__name__}")
    if not math.isfinite(module.scaling):
        raise ValueError(f"{name}: scaling must be finite, got {module.scaling}")


@dataclass(frozen=True)
class _Forms:
    """An adapter's pairs in the forms in which they are written.

    Args:
        separate: pairs of layers, by name.
        fused: pairs of the parameters of modules, one for all experts, by module and parameter.
        counts: the number of experts of each of these modules.
    """

    separate: Mapping[str, AdapterModule]
    fused: Mapping[str, Mapping[str, AdapterModule]]
    counts: Mapping[str, int]

    @property
    def experts(self) -> list[str]:
        """The names of the layers that are experts."""
        return [name for name in self.separate if owner_of(name) is not None]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer and of each parameter."""
        ranks = {name: int(module.a.shape[0]) for name, module in self.separate.items()}
        for owner, parameters in self.fused.items():
            for name, module in parameters.items():
                ranks[f"{owner}.{name}"] = int(module.a.shape[0]) // self.counts[owner]
        return ranks

    @property
    def scalings(self) -> dict[str, float]:
        """The scaling of each layer and of each parameter."""
        scalings = {name: float(module.scaling) for name, module in self.separate.items()}
        for owner, parameters in self.fused.items():
            for name, module in parameters.items():
                scalings[f"{owner}.{name}"] = float(module.scaling)
        return scalings

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the adapter by their keys."""
        for name, module in self.separate.items():
            if name.rpartition(".")[2] in EMBEDDINGS:
                yield f"{PREFIX}{name}.lora_embedding_A", module.b.T
                yield f"{PREFIX}{name}.lora_embedding_B", module.a.T
                continue
            yield f"{PREFIX}{name}.lora_A.weight", module.a
            yield f"{PREFIX}{name}.lora_B.weight", module.b
        for owner, parameters in self.fused.items():
            for name, module in parameters.items():
                inner = INNER if name == GATE_UP and len(parameters) > 1 else ""
                yield f"{PREFIX}{owner}{inner}.lora_A.weight", module.a
                yield f"{PREFIX}{owner}{inner}.lora_B.weight", module.b


def _forms(modules: Mapping[str, AdapterModule], experts: Experts | None) -> _Forms:
    """Return the pairs in the forms in which they are written."""
    if experts not in (None, "separate", "fused"):
        raise ValueError(f"experts must be 'separate', 'fused' or None, got {experts!r}")
    if experts == "separate":
        modules = separate_experts(modules)
    owners = {
        owner: parts
        for owner, parts in named_experts(modules).items()
        if experts == "fused" or GATE_UP in parts
    }
    separate = {name: module for name, module in modules.items() if owner_of(name) not in owners}
    counts = {owner: len(next(iter(parts.values()))) for owner, parts in owners.items()}
    fused = {owner: fused_experts(owner, parts) for owner, parts in owners.items()}
    forms = _Forms(separate, fused, counts)
    scalings = {float(separate[name].scaling) for name in forms.experts}
    if len(scalings) > 1:
        raise ValueError(
            f"experts have the scalings {sorted(scalings)}: PEFT on transformers 5 gives the "
            "separate pairs of all experts one; multiply B, so that they are the same"
        )
    return forms


def _config(forms: _Forms, base_model: str | None) -> dict[str, Any]:
    ranks, experts = forms.ranks, forms.experts
    use_rslora, alphas = _alphas(forms.scalings, ranks, may_use_rslora=not experts)
    own = experts if len({ranks[name] for name in experts}) == 1 else [*ranks]
    rank, alpha = (
        Counter(values[name] for name in own).most_common(1)[0][0] for values in (ranks, alphas)
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "use_dora": False,
        "use_rslora": use_rslora,
        "lora_dropout": 0.0,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(forms.separate),
        "rank_pattern": _patterns(ranks, rank),
        "alpha_pattern": _patterns(alphas, alpha),
    }
    if forms.fused:
        config["target_parameters"] = [name for name in ranks if name not in forms.separate]
        config["peft_version"] = "0.19.0"  # the first that has lora_A for in, not for out
    return config


def _alphas(
    scalings: Mapping[str, float], ranks: Mapping[str, int], *, may_use_rslora: bool
) -> tuple[bool, dict[str, int | float]]:
    """Return use_rslora and each layer's alpha; False unless only alpha / sqrt(rank) is exact.

    PEFT on transformers 5 doubles rank and alpha of the experts' gate and up, which keeps
    alpha / rank and changes alpha / sqrt(rank).
    """
    plain = {name: _alpha(scaling, ranks[name]) for name, scaling in scalings.items()}
    roots = {name: math.sqrt(rank) for name, rank in ranks.items()}
    stabilised = {name: _alpha(scaling, roots[name]) for name, scaling in scalings.items()}
    for use_rslora, alphas, divisors in ((False, plain, ranks), (True, stabilised, roots)):
        is_exact = all(alphas[name] / divisors[name] == scalings[name] for name in scalings)
        if is_exact and (may_use_rslora or not use_rslora):
            return use_rslora, alphas
    return False, plain


def _alpha(scaling: float, divisor: float) -> int | float:
    """Return an alpha for which alpha / divisor is ``scaling``, else ``scaling * divisor``."""
    near = scaling * divisor
    candidates = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    alpha = next((alpha for alpha in candidates if alpha / divisor == scaling), near)
    return int(alpha) if alpha.is_integer() else alpha


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return the values that differ from the default, by patterns that match one name each.

    PEFT uses the first pattern that matches the end of a name. So longer names go first, and a
    name that ends in a listed name is listed too, with its value.
    """
    different = {name for name, value in values.items() if value != default}
    shadowed = {name for name in values if any(name.endswith(f".{other}") for other in different)}
    names = sorted(different | shadowed, key=len, reverse=True)
    return {re.escape(name): values[name] for name in names}
