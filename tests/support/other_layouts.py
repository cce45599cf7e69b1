"""A second opinion on GPTQ's and AWQ's tensors: NumPy, written from docs/format.md alone.

Every function works on one element, or on arrays of indices. It shares no code and no trick with
the reference.
"""

import numpy as np
import torch

AWQ_NIBBLES = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}  # output within a word -> nibble


def unsigned(words):
    """Return int32 words as NumPy's uint32."""
    return words.numpy().view(np.uint32)


def gptq_code(qweight, output, column, bits):
    """Return the unsigned code of a weight."""
    per_word = 32 // bits
    return (
        unsigned(qweight)[column // per_word, output] // 2 ** (bits * (column % per_word)) % 2**bits
    )


def gptq_zero(qzeros, output, group, bits, version):
    """Return the unsigned zero-point of an output and a group."""
    per_word = 32 // bits
    stored = (
        unsigned(qzeros)[group, output // per_word] // 2 ** (bits * (output % per_word)) % 2**bits
    )
    return stored + 1 if version == 1 else stored


def awq_code(words, output, row):
    """Return the unsigned code, or zero-point, of an output in a row of words."""
    nibble = np.vectorize(AWQ_NIBBLES.get)(output % 8)
    return unsigned(words)[row, output // 8] // 16**nibble % 16


def weights(codes, zeros, scales):
    """Return (u - z) * s, rounded once to the dtype of the scales, as a tensor of that dtype.

    Args:
        codes: unsigned, an array.
        zeros: unsigned, an array that broadcasts with ``codes``.
        scales: a tensor that broadcasts with ``codes``.
    """
    difference = codes.astype(np.int64) - zeros.astype(np.int64)
    with np.errstate(invalid="ignore", over="ignore"):
        if scales.dtype != torch.bfloat16:
            narrow = {torch.float16: np.float16, torch.float32: np.float32}[scales.dtype]
            exact = difference * scales.numpy().astype(np.float64)
            return torch.from_numpy(exact.astype(narrow))
        exact = difference.astype(np.float32) * scales.float().numpy()  # 8 + 5 bits: exact
    return torch.from_numpy(nearest_bfloat16(exact).view(np.int16)).view(torch.bfloat16)


def nearest_bfloat16(exact):
    """Return the bit patterns of float32 numbers rounded to bfloat16, half to even."""
    word = exact.view(np.uint32).astype(np.uint64)
    kept, lost = word >> 16, word & 0xFFFF
    up = (lost > 0x8000) | ((lost == 0x8000) & (kept & 1 == 1))
    rounded = np.where(np.isfinite(exact), kept + up, kept | np.isnan(exact))
    return rounded.astype(np.uint16)


def dequantize_gptq(qweight, qzeros, scales, g_idx=None, *, bits=4, version=1):
    """Return the dense weight of GPTQ's tensors: ``[out_features, in_features]``."""
    columns, outputs = qweight.shape[0] * (32 // bits), qweight.shape[1]
    output, column = np.arange(outputs)[:, None], np.arange(columns)[None]
    groups = column * qzeros.shape[0] // columns if g_idx is None else g_idx.numpy()[None]
    codes = gptq_code(qweight, output, column, bits)
    zeros = gptq_zero(qzeros, output, groups, bits, version)
    return weights(codes, zeros, scales[torch.from_numpy(groups), torch.from_numpy(output)])


def dequantize_awq(qweight, qzeros, scales):
    """Return the dense weight of AWQ's tensors: ``[out_features, in_features]``."""
    columns, outputs = qweight.shape[0], 8 * qweight.shape[1]
    output, column = np.arange(outputs)[:, None], np.arange(columns)[None]
    groups = column * qzeros.shape[0] // columns
    codes, zeros = awq_code(qweight, output, column), awq_code(qzeros, output, groups)
    return weights(codes, zeros, scales[torch.from_numpy(groups), torch.from_numpy(output)])


def random_words(*shape, seed=0):
    """Return int32 words of random bits."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(0, 2**32, shape, dtype=np.uint32).view(np.int32))


def random_gptq(*, outputs=24, columns=64, groups=4, bits=4, g_idx=None, seed=0):
    """Return random GPTQ tensors, without the zero-points that version 1 cannot hold."""
    per_word = 32 // bits
    generator = np.random.default_rng(seed)
    stored = generator.integers(0, 2**bits - 1, (groups, outputs))
    order = generator.permutation(columns) * groups // columns
    return {
        "qweight": random_words(columns // per_word, outputs, seed=seed + 1),
        "qzeros": packed_zeros(stored, bits),
        "scales": random_scales(groups, outputs, seed),
        "g_idx": torch.from_numpy(order.astype(np.int32)) if g_idx else None,
    }


def random_awq(*, outputs=24, columns=64, groups=4, seed=0):
    """Return random AWQ tensors."""
    return {
        "qweight": random_words(columns, outputs // 8, seed=seed + 1),
        "qzeros": random_words(groups, outputs // 8, seed=seed + 2),
        "scales": random_scales(groups, outputs, seed),
    }


def random_scales(groups, outputs, seed=0):
    """Return float16 scales that all differ."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.uniform(0.01, 0.06, (groups, outputs)).astype(np.float16))


def packed_zeros(stored, bits):
    """Return GPTQ's ``qzeros`` of stored numbers ``[groups, outputs]``, packed one by one."""
    per_word = 32 // bits
    words = np.zeros((stored.shape[0], stored.shape[1] // per_word), dtype=np.uint64)
    for output in range(stored.shape[1]):
        words[:, output // per_word] += stored[:, output].astype(np.uint64) << np.uint64(
            bits * (output % per_word)
        )
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))
