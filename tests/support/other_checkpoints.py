"""Tiny AWQ and GPTQ checkpoints, written and computed by hand.

Scales are multiples of 2^-10 up to 127 / 1024, so that float16 holds every weight exactly.
"""

import json
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from support import layouts

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each nibble, from the lowest
CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
}
# name: (method, changes of the config, arguments of ``Other.gptq`` or ``Other.awq``)
VARIANTS = {
    "gptq_v1": ("gptq", {}, {}),
    "gptq_v1_asym": ("gptq", {"sym": False}, {"zeros": True}),
    "gptq_v2_asym": (
        "gptq",
        {"sym": False, "checkpoint_format": "gptq_v2"},
        {"zeros": True, "version": 2},
    ),
    "gptq_desc_act": ("gptq", {"desc_act": True, "sym": False}, {"zeros": True, "shuffled": True}),
    "gptq_channel": ("gptq", {"group_size": -1}, {"size": None}),
    "gptq_8_bits": ("gptq", {"bits": 8}, {"bits": 8}),
    "awq": ("awq", {}, {}),
    "awq_sym": ("awq", {"zero_point": False}, {"zeros": False}),
    "awq_channel": ("awq", {"group_size": -1, "version": "GEMM"}, {"size": None}),
}


def packed(numbers, bits, axis):
    """Pack unsigned numbers along an axis, the first in the lowest bits."""
    count = 32 // bits
    rows = numbers if axis == 1 else numbers.T
    words = np.zeros((rows.shape[0], rows.shape[1] // count), np.uint64)
    for place in range(count):
        words |= rows[:, place::count].astype(np.uint64) << np.uint64(bits * place)
    words = words.astype(np.uint32).view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(words if axis == 1 else words.T))


def packed_by_awq(numbers):
    """Pack unsigned numbers [rows, outputs] along the outputs in AWQ's order."""
    shuffled = numbers.reshape(len(numbers), -1, 8)[:, :, AWQ_ORDER].reshape(numbers.shape)
    return packed(shuffled, 4, axis=1)


class Other(layouts.Model):
    """A model whose linear layers are in GPTQ's or AWQ's layout."""

    def __init__(self, kind, seed=0, **how):
        super().__init__(seed)
        self.kind, self.how = kind, how

    def packed(self, name, rows, columns, **how):
        """Add a layer in the model's layout."""
        getattr(self, self.kind)(name, rows, columns, **{**self.how, **how})

    def gptq(self, name, rows, columns, *, size=32, bits=4, zeros=False, version=1, shuffled=False):
        """Add a layer as AutoGPTQ and GPTQModel store it; ``shuffled`` is by activation."""
        order = self.random.permutation(columns) if shuffled else np.arange(columns)
        group = order // (size or columns)
        codes, zero, scale = self._values(name, rows, columns, size, bits, zeros, group)
        self.stored[f"{name}.qweight"] = packed(codes.T, bits, axis=0)
        self.stored[f"{name}.qzeros"] = packed(zero.T - (version == 1), bits, axis=1)
        self.stored[f"{name}.scales"] = torch.tensor(scale.T.copy(), dtype=torch.float16)
        self.stored[f"{name}.g_idx"] = torch.tensor(group, dtype=torch.int32)

    def awq(self, name, rows, columns, *, size=32, zeros=True):
        """Add a layer as AutoAWQ stores it; without zero-points, as GPTQModel does."""
        group = np.arange(columns) // (size or columns)
        codes, zero, scale = self._values(name, rows, columns, size, 4, zeros, group)
        self.stored[f"{name}.qweight"] = packed_by_awq(codes.T)
        self.stored[f"{name}.qzeros"] = packed_by_awq(zero.T)
        self.stored[f"{name}.scales"] = torch.tensor(scale.T.copy(), dtype=torch.float16)

    def _values(self, name, rows, columns, size, bits, zeros, group):
        """Draw codes [rows, columns], zero-points and scales [rows, groups]; keep the weight."""
        table = (rows, columns // (size or columns))
        codes = self.random.integers(0, 2**bits, (rows, columns))
        low = 2 ** (bits - 1)
        zero = self.random.integers(1, 2**bits, table) if zeros else np.full(table, low)
        scale = self.random.integers(1, 128 if bits == 4 else 8, table) / 1024
        values = (codes - zero[:, group]) * scale[:, group]
        self.dense[f"{name}.weight"] = torch.tensor(values, dtype=torch.float16)
        return codes, zero, scale


def make(folder, variant, *, shards=1, **changes):
    """Write a tiny Llama of one of ``VARIANTS``; return the model and its folder."""
    method, fields, how = VARIANTS[variant]
    model = Other(method, **how).llama()
    config = {**CONFIGS[method], **fields, **changes}
    return model, model.save(folder, config, shards=shards)


def rewritten(source, folder, method, **changes):
    """Write a pack-quantized model in AWQ's or GPTQ's layout, its weights unchanged.

    Args:
        source: the model's folder, with one file of tensors.
        folder: the folder to write.
        method: "awq" or "gptq".
        changes: fields of the config that differ from ``CONFIGS``.
    """
    shutil.copytree(source, folder)
    config = {**CONFIGS[method], **changes}
    bits, second = config["bits"], config.get("checkpoint_format") == "gptq_v2"
    stored, tensors = load_file(folder / "model.safetensors"), {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if not part.startswith("weight_"):
            tensors[name] = tensor
        if part != "weight_packed":
            continue
        scale = stored[f"{module}.weight_scale"]
        codes = unsigned(tensor, bits)
        zero = np.full(scale.shape, 2 ** (bits - 1))
        if f"{module}.weight_zero_point" in stored:
            zero = unsigned(stored[f"{module}.weight_zero_point"].T, bits).T[: len(scale)]
        tensors[f"{module}.scales"] = scale.T.contiguous()
        if method == "awq":
            tensors[f"{module}.qweight"] = packed_by_awq(codes.T)
            tensors[f"{module}.qzeros"] = packed_by_awq(zero.T)
            continue
        order = np.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1])
        g_idx = stored.get(f"{module}.weight_g_idx", torch.tensor(order, dtype=torch.int32))
        tensors[f"{module}.qweight"] = packed(codes.T, bits, axis=0)
        tensors[f"{module}.qzeros"] = packed(zero.T - (not second), bits, axis=1)
        tensors[f"{module}.g_idx"] = g_idx
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def unsigned(words, bits):
    """Return the unsigned numbers in words that are packed along the columns, as NumPy."""
    shifts = bits * np.arange(32 // bits, dtype=np.uint32)
    numbers = (words.contiguous().numpy().view(np.uint32)[:, :, None] >> shifts) & (2**bits - 1)
    return numbers.reshape(len(numbers), -1).astype(np.int64)
