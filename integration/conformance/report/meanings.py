"""What each diagnosis and each rule means, for a reader who has not seen the code.

Source: ``docs/conformance.md``, "The verdict" and "The diagnosis".
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DIAGNOSES", "RULES", "Meaning"]


@dataclass(frozen=True)
class Meaning:
    """The meaning of a diagnosis.

    Args:
        mistake: what the backend does wrong, in a sentence.
        code: code that usually does it, or "".
        fix: what to do instead.
    """

    mistake: str
    code: str
    fix: str


DIAGNOSES: dict[str, Meaning] = {
    "nibble_order": Meaning(
        "The eight 4-bit codes of each packed word are read or written in the wrong order.",
        "code = (word >> (28 - 4 * i)) & 0xF",
        "The first code is in the lowest four bits: (word >> 4 * i) & 0xF.",
    ),
    "offset": Meaning(
        "The wrong number is subtracted from the stored codes.",
        "code = stored - 7",
        "Stored numbers are unsigned, with an offset of 8: code = stored - 8.",
    ),
    "sign_extension": Meaning(
        "The sign bit of the packed word reaches the codes.",
        "code = (word >> 28) - 8",
        "Mask after the shift, since >> on int32 copies the sign: ((word >> 28) & 0xF) - 8.",
    ),
    "zero_point_sign": Meaning(
        "The zero-point is added to the code instead of subtracted from it.",
        "w = (q + z) * s",
        "w = (q - z) * s.",
    ),
    "zero_point_axis": Meaning(
        "The table of zero-points is unpacked along the wrong axis, or transposed.",
        "zero_points = unpack(zero_point, groups, dim=1)",
        "Zero-points are packed along the outputs: unpack(zero_point, out_features, dim=0).",
    ),
    "zero_point_plus_one": Meaning(
        "Each zero-point is off by one.",
        "w = (q - (z + 1)) * s",
        "Only GPTQ's old files store z - 1; here z is stored as it is.",
    ),
    "groups_reversed": Meaning(
        "The last group's scale is used for the first inputs.",
        "scale = scales[:, groups - 1 - column // group_size]",
        "The first group's scale belongs to the first inputs: scales[:, column // group_size].",
    ),
    "g_idx_ignored": Meaning(
        "Each input takes the scale of the group at its position, although g_idx assigns "
        "another group to it.",
        "scale = scales[:, column // group_size]",
        "Where there is a g_idx, it gives the group of an input: scales[:, g_idx[column]].",
    ),
    "g_idx_column_order": Meaning(
        "The inputs are sorted by their group, and the order of the weights, of the inputs or "
        "of the groups does not follow.",
        "order = g_idx.argsort(); w = w[:, order]  # and x as it was",
        "Take each input's group from g_idx, or permute weights and inputs alike; groups may "
        "have different sizes.",
    ),
    "round_before_subtract": Meaning(
        "The products q s and z s are rounded one by one, and then subtracted.",
        "w = q * s - z * s",
        "Subtract first, since q - z is exact: w = (q - z) * s.",
    ),
    "scale_rounded": Meaning(
        "The scales are rounded to another dtype than that of the checkpoint.",
        "scale = scale.to(x.dtype)",
        "Keep the scales in the checkpoint's dtype.",
    ),
    "low_precision_accumulate": Meaning(
        "Sums are kept in float16 or bfloat16.",
        "accumulator = tl.zeros(shape, dtype=tl.float16)",
        "Accumulate in float32, and round the sum once; or declare accumulate in the manifest.",
    ),
    "masked_by_multiplication": Meaning(
        "The adapters of other tokens are multiplied by 0 instead of left out, so that their "
        "NaN and infinities reach tokens that do not use them.",
        "y += mask * delta",
        "Select instead of multiplying: y += torch.where(mask, delta, 0).",
    ),
    "g_idx_minus_one_indexed": Meaning(
        "A -1 in g_idx is used as an index, which takes the last group.",
        "scale = scales[:, g_idx]",
        "A -1 in g_idx means that the inputs are in the order of their groups: ignore g_idx.",
    ),
    "adapter_minus_one_indexed": Meaning(
        "Tokens without an adapter (id -1) get an adapter: -1 is used as an index.",
        "a = lora_a[adapter_ids]",
        "Select the tokens whose id is 0 or more; the others get no delta.",
    ),
    "scaling_missing": Meaning(
        "The delta of the adapters is not multiplied by their scaling.",
        "y += (x @ a.T) @ b.T",
        "y += scaling * (x @ a.T) @ b.T, with the scaling of each token's adapter.",
    ),
    "scaling_twice": Meaning(
        "The delta of the adapters is multiplied by their scaling twice.",
        "b = scaling * b; y += scaling * (x @ a.T) @ b.T",
        "Multiply once: in b or in the sum.",
    ),
    "slices_swapped": Meaning(
        "The delta of one slice of a merged layer (q, k, v or gate, up) is added at the place "
        "of another.",
        "y[:, starts[order[i]] :] += delta[i]",
        "Slice i begins at the output slices[i].start.",
    ),
    "tail_lost": Meaning(
        "The last inputs, outputs or tokens are left out where their number is no multiple of "
        "the block.",
        "for block in range(size // BLOCK):",
        "Round up, and mask the last block: range((size + BLOCK - 1) // BLOCK).",
    ),
    "stale_adapter_ids": Meaning(
        "The adapter ids of an earlier call are used.",
        "graph.replay()  # with the ids it was captured with",
        "Copy the ids of each call into the buffer that the graph reads.",
    ),
    "unknown": Meaning(
        "None of the known mistakes reproduces these results.",
        "",
        "The map shows which elements are wrong; the Python below computes one of them again.",
    ),
}
"""By the names of ``IDENTIFIERS``."""

RULES: dict[str, str] = {
    "call": "the call must not raise an exception",
    "crash": "the process must not end",
    "hang": "a case must end within the time limit",
    "modified": "a backend must not write to its operands",
    "form": "a result must have the right type, dtype, shape and device",
    "class": "each element must be NaN, infinite or finite where the exact answer is",
    "equal": "these results must be equal to the exact answer",
    "bound": "each element must be within its bound of the exact answer",
    "rms": "the rms error must be at most twice that of eager PyTorch with the same roundings",
    "systematic_error": "errors must have no systematic part: roundings to nearest have none",
    "memory": "a result must not share memory with an operand or overlap itself",
    "repeat": "a repeated call must give the same bits",
    "kept": "a later call must not write over an earlier result",
}
"""What each rule demands."""
