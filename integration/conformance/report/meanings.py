"""What each diagnosis and each rule means, for a reader who has not seen the code.

The code and the fix of a diagnosis are in ``REMEDIES``.

Source: ``docs/conformance.md``, "The verdict" and "The diagnosis".
"""

from __future__ import annotations

__all__ = ["MISTAKES", "RULES"]


MISTAKES: dict[str, str] = {
    "awq_order_ignored": "The order in which AWQ puts eight outputs into a word is not undone.",
    "gptq_zero_plus_one": (
        "The zero-points of one version of GPTQ's files are read as those of the other version."
    ),
    "packed_along_inputs": "The words of AWQ or GPTQ are unpacked along the wrong axis.",
    "nibble_order": (
        "The eight 4-bit codes of each packed word are read or written in the wrong order, or the "
        "two FP4 codes of each byte."
    ),
    "fp4_sign": "The sign bit of FP4 codes is left out or inverted.",
    "global_scale_missing": "NVFP4's scales are not divided by the global scale.",
    "global_scale_multiplied": "NVFP4's scales are multiplied by the global scale, not divided.",
    "e8m0_bias": "MXFP4's E8M0 scales are read with a wrong bias, or as plain numbers.",
    "fp4_table": "FP4 codes are not looked up in the table 0, 0.5, 1, 1.5, 2, 3, 4, 6.",
    "offset": "The wrong number is subtracted from the stored codes.",
    "sign_extension": "The sign bit of the packed word reaches the codes.",
    "zero_point_sign": "The zero-point is added to the code instead of subtracted from it.",
    "zero_point_axis": "The table of zero-points is unpacked along the wrong axis, or transposed.",
    "zero_point_plus_one": "Each zero-point is off by one.",
    "groups_reversed": "The last group's scale is used for the first inputs.",
    "g_idx_ignored": (
        "Each input takes the scale of the group at its position, although g_idx assigns "
        "another group to it."
    ),
    "g_idx_column_order": (
        "The inputs are sorted by their group, and the order of the weights, of the "
        "inputs or of the groups does not follow."
    ),
    "round_before_subtract": (
        "The products q s and z s are rounded one by one, and then subtracted."
    ),
    "scale_rounded": "The scales are rounded to another dtype than that of the checkpoint.",
    "low_precision_accumulate": "Sums are kept in float16 or bfloat16.",
    "masked_by_multiplication": (
        "The adapters of other tokens are multiplied by 0 instead of left out, so that "
        "their NaN and infinities reach tokens that do not use them."
    ),
    "g_idx_minus_one_indexed": "A -1 in g_idx is used as an index, which takes the last group.",
    "adapter_minus_one_indexed": (
        "Tokens without an adapter (id -1) get an adapter: -1 is used as an index."
    ),
    "scaling_missing": "The delta of the adapters is not multiplied by their scaling.",
    "scaling_twice": "The delta of the adapters is multiplied by their scaling twice.",
    "slices_swapped": (
        "The delta of one slice of a merged layer (q, k, v or gate, up) is added at the "
        "place of another."
    ),
    "tail_lost": (
        "The last inputs, outputs or tokens are left out where their number is no "
        "multiple of the block."
    ),
    "stale_adapter_ids": "The adapter ids of an earlier call are used.",
    "expert_adapters_dropped": "The adapters of experts are left out, in all layers or in one.",
    "expert_and_adapter_swapped": (
        "The pair of an expert and an adapter is looked up with the two exchanged."
    ),
    "gate_up_swapped": "The activation is applied to up, or to other rows than those of the gate.",
    "weights_before_activation": (
        "The routed weights multiply the input of the experts instead of their results, or the "
        "other way round."
    ),
    "routed_weight_missing": "The routed weights are left out, or divided by their sum.",
    "shared_order": "The pair that PEFT stores for all experts is split in the wrong order.",
    "dropped_expert_indexed": "The expert id -1 is used as an index instead of being left out.",
    "repeated_expert_once": "An expert that a token lists twice counts once.",
    "unknown": "None of the known mistakes reproduces these results.",
}
"""What a backend does wrong, in a sentence, by the names of ``IDENTIFIERS``."""

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
