"""A second opinion on the bits: NumPy, one element at a time, written from docs/format.md alone.

It shares no code and no vectorised trick with the reference.
"""

import math

import numpy as np
import torch


def unpack_row(words, width, bits):
    """Return the signed codes of one row of int32 words."""
    codes = []
    for position in range(width):
        word = int(words[position * bits // 32]) % 2**32  # as an unsigned number
        stored = word // 2 ** (position * bits % 32) % 2**bits
        codes.append(stored - 2 ** (bits - 1))
    return codes


def round_to(value, dtype):
    """Round a Python float once to a float dtype, half to even; returns a float64."""
    if dtype == torch.float32:
        return float(np.float32(value))
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return float(np.float16(value))
    if not np.isfinite(value) or value == 0:
        return value
    word = int(np.float32(value).view(np.uint32))  # exact for (q - z) * s of a bfloat16 scale
    kept, lost = word >> 16, word & 0xFFFF
    if lost > 0x8000 or (lost == 0x8000 and kept & 1):
        kept += 1
    return float(np.uint32(kept << 16).view(np.float32))


def dequantize(weight):
    """Return the dense weight as a float64 array, each value rounded once to the scale's dtype."""
    rows, columns = weight.shape
    scale = weight.scale.to(torch.float64).numpy()
    g_idx = None if weight.g_idx is None else weight.g_idx.tolist()
    if g_idx is not None and -1 in g_idx:
        g_idx = None
    dense = np.empty((rows, columns))
    for i in range(rows):
        codes = unpack_row(weight.packed[i].tolist(), columns, weight.bits)
        for j in range(columns):
            where = place(weight, scale.shape, g_idx, i, j)
            zero_point = zero_point_of(weight, where, i)
            dense[i, j] = round_to(
                float((codes[j] - zero_point) * scale[where]), weight.scale.dtype
            )
    return dense


def place(weight, table, g_idx, i, j):
    """Return where the scale of weight (i, j) stands in the scale table."""
    if len(table) == 1:
        return (0,)
    if isinstance(weight.group_size, tuple):
        return i // weight.group_size[0], j // weight.group_size[1]
    if g_idx is not None:
        return i, g_idx[j]
    return i, j * table[1] // weight.shape[1]


def zero_point_of(weight, where, i):
    """Return the zero-point of the scale at ``where``, for output i."""
    if weight.zero_point is None:
        return 0
    if weight.zero_point.dtype == torch.int8:
        return int(weight.zero_point[where])
    column = weight.zero_point[:, where[1]].tolist()
    return unpack_row(column, weight.shape[0], weight.bits)[i]


def moe(x, experts, topk_ids, topk_weights, lora, adapter_ids, activation, weights_first):
    """Return y of experts, one token, slot and output at a time, in Python's floats."""
    weights = {
        name: [dequantize(weight) for weight in getattr(experts, name)]
        for name in ("gate_up", "down")
    }
    y = np.zeros((x.shape[0], experts.hidden))
    for token in range(x.shape[0]):
        for slot in range(topk_ids.shape[1]):
            expert, p = int(topk_ids[token, slot]), float(topk_weights[token, slot])
            if expert < 0:
                continue
            adapter = -1 if adapter_ids is None else int(adapter_ids[token])
            row = [float(value) * (p if weights_first else 1.0) for value in x[token]]
            gate_up = expert_layer(
                row, weights["gate_up"][expert], lora, "gate_up", expert, adapter
            )
            h = []
            for i in range(experts.inter):
                h.append(activate(gate_up[i], activation) * gate_up[experts.inter + i])
            down = expert_layer(h, weights["down"][expert], lora, "down", expert, adapter)
            for output in range(experts.hidden):
                y[token, output] += down[output] * (1.0 if weights_first else p)
    return y


def expert_layer(row, dense, lora, name, expert, adapter):
    """Return the outputs of one layer of one expert for one token."""
    y = [sum(w * value for w, value in zip(line, row, strict=True)) for line in dense.tolist()]
    entries = None if lora is None else getattr(lora, name)
    if entries is None or entries[expert] is None or adapter < 0:
        return y
    entry = entries[expert]
    for stack, start in (
        [(e.stack, e.start) for e in entry] if isinstance(entry, list) else [(entry, 0)]
    ):
        a, b = stack.a[adapter].tolist(), stack.b[adapter].tolist()
        h = [sum(w * value for w, value in zip(line, row, strict=True)) for line in a]
        for output, line in enumerate(b):
            delta = sum(w * value for w, value in zip(line, h, strict=True))
            y[start + output] += float(stack.scaling[adapter]) * delta
    return y


def activate(value, activation):
    """Return SiLU of a float, or GELU in its tanh form."""
    if activation == "silu":
        return value / (1 + math.exp(-value)) if value > -700 else 0.0
    return value / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))
