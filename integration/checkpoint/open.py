"""Open INT4 checkpoints of compressed-tensors, GPTQ and AWQ; tensors are read only when requested.

Source: ``docs/format.md``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from int4_lora.integration.checkpoint.assembly import assemble, shape_that_fits
from int4_lora.integration.checkpoint.float4_assembly import (
    assemble_float4,
    check_float4_parts,
)
from int4_lora.integration.checkpoint.hub import local_folder
from int4_lora.integration.checkpoint.json_files import read_json_object
from int4_lora.integration.checkpoint.layouts import (
    AWQ,
    FLOAT4,
    INT_QUANTIZED,
    LAYOUTS,
    PACK_QUANTIZED,
    Layout,
)
from int4_lora.integration.checkpoint.misplaced_adapters import (
    check_is_no_adapter,
    check_no_adapter_within,
)
from int4_lora.integration.checkpoint.model_files import (
    ModelFiles,
    UnlistedFile,
    describe_left,
    describe_unlisted,
    read_model_files,
    with_unlisted,
)
from int4_lora.integration.checkpoint.other_schemes import OTHER_SCHEMES
from int4_lora.integration.checkpoint.quantization_config import (
    METHOD,
    method_of,
    quantizations,
    read_quantization,
)
from int4_lora.integration.checkpoint.safetensors_files import (
    DTYPES,
    bytes_of,
    inside,
    read_tensor,
)
from int4_lora.integration.checkpoint.safetensors_header import StoredTensor
from int4_lora.integration.checkpoint.scheme import PACKED_FORMAT, Scheme, read_schemes
from int4_lora.integration.checkpoint.spellings import spellings
from int4_lora.reference import Float4Weight, PackedWeight

__all__ = ["FLOATS", "PARTS", "Checkpoint", "Unlisted", "open_checkpoint"]

Unlisted = Literal["take", "leave"]
PARTS = PACK_QUANTIZED.parts

MARKS = ("weight_packed", "weight_scale")  # of a quantised module, whatever else it stores
OF_OTHER_LAYOUTS = ("weight", *PACK_QUANTIZED.parts, "g_idx")
FLOATS = ("F64", "F32", "F16", "BF16")
COMPRESS = "Save the model with llm-compressor's save_pretrained(save_compressed=True)"
USE_DENSE = (
    "or, as its weights are dense already, use it as a dense model: remove quantization_config "
    "from config.json"
)
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its tensors, and how each module is quantised.

    Args:
        path: the checkpoint's folder.
        config: the content of ``config.json``.
        tensors: file, dtype and shape of every tensor, by the tensor's name.
        schemes: how each quantised module is stored, by the module's name.
        files: the safetensors files, with the tensors that are not listed as the model's; None if
            nothing is unlisted.
        leaves_unlisted: whether the unlisted tensors are left on purpose.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    schemes: Mapping[str, Scheme]
    files: ModelFiles | None = None
    leaves_unlisted: bool = False

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The part of ``config.json`` that describes the quantisation."""
        return read_quantization(self.path / "config.json", self.config)

    @property
    def unlisted(self) -> Sequence[UnlistedFile]:
        """The files with tensors that are in the folder, but not listed as the model's."""
        return () if self.files is None else self.files.unlisted

    def spelling_of(self, module: str) -> str | None:
        """Return the name here of a quantised module that others may spell differently, or None.

        Args:
            module: the module's name in transformers or vLLM.
        """
        return next((name for name in spellings(module) if name in self.schemes), None)

    @property
    def left_behind(self) -> tuple[str, ...]:
        """What ``unlisted="leave"`` leaves behind in the files that are read, in sentences."""
        return () if self.files is None or not self.leaves_unlisted else describe_left(self.files)

    def check_listed(self) -> None:
        """Check that no tensor is unlisted, unless the unlisted ones are left on purpose.

        Raises:
            ValueError: tensors are unlisted; the message names them, and the choice there is.
        """
        if self.files is not None and self.unlisted and not self.leaves_unlisted:
            raise ValueError(f"{self.path}: {describe_unlisted(self.files)}")

    def check_compressed_tensors(self, use: str) -> None:
        """Check that the checkpoint is one of compressed-tensors.

        Args:
            use: what needs it, for the message.

        Raises:
            ValueError: it is one of GPTQ or AWQ.
        """
        method = method_of(self.quantization)
        if method != METHOD:
            raise ValueError(
                f"{self.path}: {use} needs a compressed-tensors checkpoint, got quant_method "
                f"{method!r}: int4-lora convert writes one without changing a weight"
            )

    def layout(self, name: str) -> Layout:
        """Return the names of the tensors of a quantised module."""
        form = self.schemes[name].format
        return LAYOUTS.get(form) or FLOAT4.get(form, PACK_QUANTIZED)

    def stored(self, name: str) -> list[str]:
        """Return the full names of the tensors of a packed or FP4 module, its codes' first."""
        full = (f"{name}.{part}" for part in self.layout(name).parts)
        return [tensor for tensor in full if tensor in self.tensors]

    def modules(self) -> list[str]:
        """Return the names of the quantised modules, in the order of the checkpoint."""
        return list(self.schemes)

    @functools.cached_property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """The last parts of the names of each quantised module's own tensors, sorted."""
        found: dict[str, list[str]] = {name: [] for name in self.schemes}
        for full in sorted(self.tensors):
            module, _, part = full.rpartition(".")
            if module in found:
                found[module].append(part)
        return found

    def is_packed(self, name: str) -> bool:
        """Return whether ``packed_weight`` can read a module: a known layout, int, 4 or 8 bits."""
        scheme = self.schemes[name]
        return scheme.format in LAYOUTS and scheme.kind == "int" and scheme.bits in (4, 8)

    def is_pack_quantized(self, name: str) -> bool:
        """Return whether ``packed_weight`` can read a module, whose codes are stored in words."""
        return self.is_packed(name) and self.layout(name) is PACK_QUANTIZED

    def is_stored_as_read(self, name: str) -> bool:
        """Return whether a module's codes are read as they are stored, and nothing is converted."""
        return self.is_pack_quantized(name) or self.is_float4(name)

    def is_float4(self, name: str) -> bool:
        """Return whether ``float4_weight`` can read a module: NVFP4 or MXFP4."""
        scheme = self.schemes[name]
        return scheme.format in FLOAT4 and scheme.kind == "float" and scheme.bits == 4

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: the tensor's full name.

        Returns:
            The tensor, on the CPU, in its stored dtype and shape.

        Raises:
            ValueError: the tensor does not exist, or its file cannot be read.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path}: no tensor named {name!r}")
        inside(self.path, self.tensors[name].file.name)  # a link may have replaced the file
        return read_tensor(self.tensors[name], name)

    def shape_of(self, name: str) -> tuple[int, int]:
        """Return a quantised module's shape: ``(out_features, in_features)``.

        It is the stored ``weight_shape``. If a packed module stores none, it is the only shape for
        which the other tensors and the config agree. The tensors of other layouts tell it.

        Raises:
            ValueError: ``weight_shape`` does not hold two positive integers, or it is missing and
                none or several shapes are possible.
        """
        if name in self.schemes and self.is_float4(name):
            return self._float4_weight(name, self._described).shape
        full = f"{name}.weight_shape"
        if full in self.tensors:
            return self._stored_shape(name, self.tensors[full])
        if name not in self.schemes or not self.is_packed(name):
            raise ValueError(f"{self.path}: {name}: weight_shape is missing")
        if self.layout(name) is not PACK_QUANTIZED:
            return self._packed_weight(name, self._described).shape
        where = self._where(name)
        self._check_parts(where, name, self.schemes[name])
        try:
            return shape_that_fits(self.schemes[name], self._parts(name, self._described))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _stored_shape(self, name: str, stored: StoredTensor) -> tuple[int, int]:
        """Return the shape that a ``weight_shape`` of any integer dtype holds."""
        where = f"{stored.file}: {name}: weight_shape must be"
        if stored.dtype not in INTEGERS or tuple(stored.shape) != (2,):
            shown = f"{stored.dtype} {list(stored.shape)}"
            raise ValueError(f"{where} two integers of shape [2], got {shown}")
        raw = read_tensor(bytes_of(stored, 0, stored.nbytes), f"{name}.weight_shape")
        half, data = stored.nbytes // 2, raw.numpy().tobytes()
        rows, columns = (
            int.from_bytes(part, "little", signed=stored.dtype.startswith("I"))
            for part in (data[:half], data[half:])
        )
        if rows < 1 or columns < 1:
            raise ValueError(f"{where} two positive lengths, got [{rows}, {columns}]")
        return rows, columns

    def column_order(self, name: str) -> bool:
        """Return whether a module's columns are grouped by position.

        They are without a g_idx, with one that holds a -1, and with one that numbers the groups of
        the config in order.

        Args:
            name: the name of a quantised module.

        Raises:
            TypeError: the tensor is not int32.
            ValueError: the tensor cannot be read.
        """
        full = f"{name}.{self.layout(name).g_idx}"
        if full not in self.tensors:
            return True
        stored = self.tensors[full]
        if stored.dtype != "I32":
            raise TypeError(f"{stored.file}: {name}: g_idx must be int32, got {stored.dtype}")
        if len(stored.shape) != 1:
            shape = list(stored.shape)
            raise ValueError(f"{stored.file}: {name}: g_idx must be [in_features], got {shape}")
        g_idx = self.tensor(full)
        size = self.schemes[name].group_size
        in_order = torch.arange(len(g_idx)) // (size if isinstance(size, int) else len(g_idx) or 1)
        return bool((g_idx == -1).any()) or torch.equal(g_idx.long(), in_order)

    def packed_weight(self, name: str) -> PackedWeight:
        """Read the packed weight of one quantised module.

        Args:
            name: the module's full name, one of ``modules()``.

        Returns:
            The packed weight, with the checkpoint's tensors unchanged.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: the module does not exist or has another format, or a tensor is missing or
                contradicts the other tensors or the config; the message names file, module and
                rule.
        """
        return self._packed_weight(name, self.tensor)

    def float4_weight(self, name: str) -> Float4Weight:
        """Read the FP4 weight of one quantised module.

        Args:
            name: the module's full name, one of ``modules()``.

        Returns:
            The weight, with the checkpoint's tensors unchanged.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: the module does not exist or has another format, or a tensor is missing or
                contradicts the other tensors or the config; the message names file, module and
                rule.
        """
        return self._float4_weight(name, self.tensor)

    def _float4_weight(self, name: str, get: Callable[[str], Tensor]) -> Float4Weight:
        """Return an FP4 weight, reading its tensors with ``get``."""
        if name not in self.schemes:
            raise ValueError(f"{self.path}: no quantised module named {name!r}")
        scheme = self.schemes[name]
        if not self.is_float4(name):
            raise ValueError(
                f"{self.path}: {name}: is {scheme.format} ({scheme.kind}, {scheme.bits} bits), "
                f"not {' or '.join(FLOAT4)}"
            )
        try:
            check_float4_parts(scheme, self.parts[name])
            return assemble_float4(scheme, self._parts(name, get))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self._where(name)}: {error}") from error

    def weight(self, name: str) -> PackedWeight | Float4Weight:
        """Read the weight of one quantised module, of integers or FP4.

        Args:
            name: the module's full name, one of ``modules()``.

        Returns:
            What ``packed_weight`` or ``float4_weight`` returns.

        Raises:
            TypeError: as in these.
            ValueError: as in these.
        """
        if name in self.schemes and self.is_float4(name):
            return self.float4_weight(name)
        return self.packed_weight(name)

    def check(self, name: str) -> None:
        """Check a quantised module by its headers and its ``weight_shape`` alone.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: as in ``packed_weight``, as far as shapes and dtypes show it.
        """
        if name in self.schemes and self.is_float4(name):
            self._float4_weight(name, self._described)
            return
        self._packed_weight(name, self._described)

    def check_values(self, name: str) -> PackedWeight:
        """Check a quantised module by its headers, and by the values of its small tensors.

        Returns:
            The packed weight, with zeros in place of the tensors whose values cannot be wrong.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: as in ``packed_weight``.
        """
        checked = {f"{name}.{part}" for part in self.layout(name).checked}
        self.check(name)

        def get(full: str) -> Tensor:
            if full in checked:
                return self.tensor(full)
            described = self._described(full)
            return torch.zeros((), dtype=described.dtype).expand(described.shape)

        return self._packed_weight(name, get)

    def _packed_weight(self, name: str, get: Callable[[str], Tensor]) -> PackedWeight:
        """Return a packed weight, reading its tensors with ``get``."""
        if name not in self.schemes:
            raise ValueError(f"{self.path}: no quantised module named {name!r}")
        scheme, where = self.schemes[name], self._where(name)
        if not self.is_packed(name):
            raise ValueError(
                f"{where}: is {scheme.format} ({scheme.kind}, {scheme.bits} bits), "
                f"not {PACKED_FORMAT} or int-quantized of int, 4 or 8 bits"
            )
        self._check_parts(where, name, scheme)
        shape = self.shape_of(name) if self.layout(name) is PACK_QUANTIZED else None
        try:
            return assemble(scheme, self._parts(name, get), shape)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error

    def _where(self, name: str) -> str:
        """Return the file and the name of a quantised module, for messages."""
        return f"{self.tensors[self.stored(name)[0]].file}: {name}"

    def _parts(self, name: str, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return a module's tensors but its shape, by the last part of their names."""
        return {
            part: get(f"{name}.{part}")
            for part in self.layout(name).parts
            if part != "weight_shape" and f"{name}.{part}" in self.tensors
        }

    def _described(self, name: str) -> Tensor:
        """Return a tensor without data, with the dtype and shape of the header."""
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise ValueError(f"{stored.file}: {name}: torch cannot hold the dtype {stored.dtype}")
        return torch.empty(tuple(stored.shape), dtype=DTYPES[stored.dtype], device="meta")

    def _check_parts(self, where: str, name: str, scheme: Scheme) -> None:
        layout = self.layout(name)
        if layout not in (PACK_QUANTIZED, INT_QUANTIZED):
            self._check_other_parts(where, name, scheme)
            return
        kind = "a packed" if layout is PACK_QUANTIZED else "a quantised"
        needed = {layout.codes: kind, "weight_scale": "a quantised"}
        if not scheme.symmetric:
            needed["weight_zero_point"] = "an asymmetric"
        elif f"{name}.weight_zero_point" in self.tensors:
            raise ValueError(f"{where}: weight_zero_point is stored, but the config says symmetric")
        for part, kind in needed.items():
            self._check_stored(where, f"{name}.{part}", f"{part} of {kind} module")
        if scheme.actorder == "group":
            what = "weight_g_idx of a module with actorder 'group'"
            self._check_stored(where, f"{name}.weight_g_idx", what)
        if layout is INT_QUANTIZED:
            if f"{name}.weight_packed" in self.tensors:
                raise ValueError(
                    f"{where}: weight_packed is stored beside weight, and {scheme.format} has none"
                )
            return
        packed = self.tensors[f"{name}.weight_packed"]
        if len(packed.shape) != 2:
            experts = ": experts that are packed into one tensor are not read"
            raise ValueError(
                f"{where}: weight_packed must be a matrix, got {packed.dtype} {[*packed.shape]}"
                f"{experts if len(packed.shape) == 3 else ''}"
            )
        for part in ("weight", "weight_global_scale"):
            if f"{name}.{part}" in self.tensors:
                raise ValueError(
                    f"{where}: {part} is stored beside weight_packed, and {PACKED_FORMAT} has none"
                )

    def _check_other_parts(self, where: str, name: str, scheme: Scheme) -> None:
        """Check which tensors of a module in GPTQ's or AWQ's layout are stored."""
        needed = ["qweight", "scales", "qzeros"]
        if scheme.actorder == "group":
            needed.append("g_idx")
        if self.stored(name) == [f"{name}.scales"]:
            raise ValueError(
                f"{where}: scales are stored without qweight: AutoAWQ divides an activation by "
                "them, which no other layout does"
            )
        kind = "an awq" if scheme.format == AWQ else f"a {scheme.format}"
        for part in needed:
            self._check_stored(where, f"{name}.{part}", f"{part} of {kind} module")
        for part in OF_OTHER_LAYOUTS:
            if part not in self.layout(name).parts and f"{name}.{part}" in self.tensors:
                raise ValueError(
                    f"{where}: {part} is stored beside qweight, and {scheme.format} has none"
                )

    def _check_stored(self, where: str, full: str, what: str) -> None:
        """Check that a tensor is there; if it is not, say whether it is unlisted."""
        if full in self.tensors:
            return
        holders = [file.file.name for file in self.unlisted if full in file.tensors]
        why = f": it is in {holders[0]}, but not listed as the model's" if holders else ""
        old = self.tensors.get(full.removesuffix("_packed"))
        if full.endswith("weight_packed") and old is not None and old.dtype == "I32":
            why = ": weight is I32: rename it to weight_packed, its name since May 2024"
        raise ValueError(f"{where}: {what} is missing{why}")


def open_checkpoint(
    path: str | os.PathLike[str], *, unlisted: Unlisted | None = None
) -> Checkpoint:
    """Open a checkpoint of compressed-tensors, GPTQ or AWQ, in one file or sharded.

    Args:
        path: the folder with ``config.json`` and the safetensors files, or the ``owner/name`` of
            a model on the Hugging Face hub, which is downloaded unless it is in the hub's cache.
        unlisted: what to do with tensors that are in the folder's safetensors files, but not
            listed as the model's: "take" makes them part of the model, "leave" goes without them.
            None only records them in ``Checkpoint.unlisted``; then whatever would lose them
            refuses the checkpoint.

    Returns:
        The checkpoint, before any tensor is read.

    Raises:
        FileNotFoundError: the folder, or a file that it must have, does not exist.
        ImportError: ``path`` is a name on the hub, and huggingface_hub is not installed.
        ValueError: a file cannot be read or is outside the folder, the quantisation is of another
            method or layout, the checkpoint was saved without compression, or the unlisted tensors
            cannot be taken.

    Example:
        >>> checkpoint = open_checkpoint("my-model-W4A16")  # doctest: +SKIP
        >>> weight = checkpoint.packed_weight(checkpoint.modules()[0])  # doctest: +SKIP

    Source:
        The folder layout of transformers' ``save_pretrained``.
    """
    if unlisted not in (None, "take", "leave"):
        raise ValueError(f"unlisted must be 'take', 'leave' or None, got {unlisted!r}")
    folder = local_folder(path)
    check_is_no_adapter(folder)
    file = inside(folder, "config.json")
    config = read_json_object(file)
    files = read_model_files(folder)
    taken = unlisted == "take" and bool(files.unlisted)
    tensors = with_unlisted(folder, files) if taken else files.tensors
    check_no_adapter_within(folder, tensors)
    method = _method(file, config)
    quantised = _quantised(tensors, method)
    if not quantised:
        if unlisted is None and files.unlisted:
            why = f"{files.list_name} lists none; {describe_unlisted(files)}"
        else:
            why = _why_none_is_quantised(file, config, tensors)
        codes = "weight_packed" if method == METHOD else "qweight"
        raise ValueError(f"{folder}: no tensor named *.{codes}: {why}")
    if method == METHOD:
        _check_compressed(file, config, tensors, quantised)
        schemes = read_schemes(file, config, quantised)
    else:
        schemes = OTHER_SCHEMES[method](file, read_quantization(file, config), quantised)
    known = files if files.unlisted and not taken else None
    return Checkpoint(folder, config, tensors, schemes, known, leaves_unlisted=unlisted == "leave")


def _method(file: Path, config: Mapping[str, Any]) -> str:
    """Return the method that config.json names: compressed-tensors if it describes none."""
    return method_of(read_quantization(file, config)) if quantizations(config) else METHOD


def _quantised(tensors: Collection[str], method: str) -> dict[str, None]:
    """Return the names of the quantised modules, in the order of the tensors.

    Parts of a packed module that has lost both its codes and its scales are such a module, too,
    unless a plain weight stands beside them.
    """
    parts = PARTS if method == METHOD else LAYOUTS[method].parts
    marks = MARKS if method == METHOD else parts[:1]
    found: dict[str, None] = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part in parts and (part in marks or f"{module}.weight" not in tensors):
            found[module] = None
    return found


def _why_none_is_quantised(
    file: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> str:
    """Return why a checkpoint holds no tensor that compressed-tensors would have quantised.

    Raises:
        ValueError: config.json is of another method, whose tensors have other names.
    """
    described = next(iter(quantizations(config)), None)
    if described is not None:
        read_quantization(file, config)
    matrices = {stored.dtype for stored in tensors.values() if len(stored.shape) > 1}
    if described is None or not matrices or not matrices <= {*FLOATS}:
        return "not a packed checkpoint"
    return (
        f"config.json has {described}, but the weights are stored as floats, without compression. "
        f"{COMPRESS}; {USE_DENSE}"
    )


def _check_compressed(
    file: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    quantised: Collection[str],
) -> None:
    """Check that no quantised module stores its weight as floats.

    llm-compressor saves such checkpoints with ``save_compressed=False``: the weights, and the
    scales that they would be rounded with.
    """
    status = read_quantization(file, config).get("quantization_status")
    floats = [
        name
        for name in quantised
        if f"{name}.weight_packed" not in tensors
        and f"{name}.weight" in tensors
        and tensors[f"{name}.weight"].dtype in FLOATS
    ]
    if floats:
        weight = tensors[f"{floats[0]}.weight"]
        raise ValueError(
            f"{weight.file}: {floats[0]}: the weight is stored as {weight.dtype} beside "
            f"weight_scale: {len(floats)} of {len(quantised)} quantised modules were saved without "
            f"compression (quantization_status {status!r}). {COMPRESS}; {USE_DENSE}, and the "
            "scales and zero-points"
        )
