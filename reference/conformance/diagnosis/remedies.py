"""What each diagnosis means, the line of code that usually makes the mistake, and the fix.

Source: the faults of kernels and engines in the field, in the notation of ``docs/format.md``; the
table of ``docs/conformance.md`` is a copy, which a test compares with this one.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["REMEDIES", "Remedy"]


@dataclass(frozen=True)
class Remedy:
    """The way from a diagnosis to a fix.

    Args:
        meaning: what the backend does.
        line: code that does it, or "".
        fix: what to do instead.
    """

    meaning: str
    line: str
    fix: str


REMEDIES: dict[str, Remedy] = {
    "awq_order_ignored": Remedy(
        "AWQ's nibbles taken in order from the lowest, or put in the order of packing once more",
        "u = (qweight[j, o // 8] >> (4 * (o % 8))) & 0xF",
        "take nibble `(0, 4, 1, 5, 2, 6, 3, 7)[o % 8]` for output o, in codes and zero-points",
    ),
    "gptq_zero_plus_one": Remedy(
        "the zero-points of GPTQ's version 1 read as those of version 2, or the other way round",
        "z = (qzeros[g, o // 8] >> (4 * (o % 8))) & 0xF",
        "add 1 to the stored zero-points in files of version 1, and not in those of version 2",
    ),
    "packed_along_inputs": Remedy(
        "AWQ's words read as packed along the inputs, GPTQ's as packed along the outputs, or "
        "either not transposed",
        "packed = qweight.reshape(-1, out_features).T",
        "unpack AWQ's words along the outputs, `dim=1`, GPTQ's along the inputs, `dim=0`, and "
        "transpose the codes",
    ),
    "nibble_order": Remedy(
        "the codes of a word, or of its bytes, in the other order",
        "code = (word >> (28 - 4 * i)) & 0xF",
        "shift by 4 i: the first code of a word, or of a byte of FP4, is in its lowest bits",
    ),
    "fp4_sign": Remedy(
        "an FP4 code's highest bit left out, or the sign inverted",
        "w = table[code & 7] * s",
        "the highest bit of a code is its sign, set for negative values",
    ),
    "global_scale_missing": Remedy(
        "NVFP4's scales used without the global scale",
        "w = value * scale.float()",
        "divide by the global scale: `value * scale / global_scale`",
    ),
    "global_scale_multiplied": Remedy(
        "NVFP4's global scale multiplied, as ModelOpt stores it, not divided",
        "w = value * scale.float() * global_scale",
        "divide: compressed-tensors stores the reciprocal of ModelOpt's weight_scale_2",
    ),
    "e8m0_bias": Remedy(
        "MXFP4's scales read with another bias, or as numbers",
        "s = torch.exp2(scale.float() - 126)",
        "a scale s means `2 ** (s - 127)`, and 255 is NaN",
    ),
    "fp4_table": Remedy(
        "FP4 codes read as whole numbers, or the table's values doubled",
        "value = code - 16 if code >= 8 else code",
        "look the magnitude up: 0, 0.5, 1, 1.5, 2, 3, 4, 6 for the codes 0 to 7",
    ),
    "offset": Remedy(
        "7, 9 or 0 subtracted from the stored number instead of 8",
        "q = stored - 7",
        "subtract 8, from weights and from packed zero-points",
    ),
    "sign_extension": Remedy(
        "`>>` without the mask, or stored numbers read as two's complement",
        "q = (word >> shift) - 8",
        "mask what was shifted, `(word >> shift) & 0xF`, and subtract 8",
    ),
    "zero_point_sign": Remedy("q + z", "w = (q + z) * s", "subtract the zero-point"),
    "zero_point_axis": Remedy(
        "zero-points unpacked along the groups, or the table transposed",
        "z = unpack(zero_point, groups, dim=1)",
        "unpack along the outputs, `dim=0`: the table is `[out, groups]`",
    ),
    "zero_point_plus_one": Remedy(
        "z + 1, or z - 1",
        "z = unpack(zero_point, out, dim=0) + 1",
        "take z as it is stored; only GPTQ's files of version 1 store z - 1",
    ),
    "groups_reversed": Remedy(
        "the last group's scale used for the first columns",
        "s = scale[row, groups - 1 - column // group_size]",
        "the group of a column is `column // group_size`",
    ),
    "g_idx_ignored": Remedy(
        "columns assigned to groups by position, as without g_idx",
        "s = scale[row, column // group_size]",
        "use `scale[row, g_idx[column]]` where g_idx is given and holds no -1",
    ),
    "g_idx_column_order": Remedy(
        "g_idx sorted, or the columns left in the order of groups",
        "w = dequantize(packed[:, argsort(g_idx)])",
        "look the scale up by `g_idx[column]`, or permute x like the columns; groups may differ "
        "in size",
    ),
    "g_idx_minus_one_indexed": Remedy(
        "a -1 of g_idx used as an index: the last group, or the first; or column order for its "
        "column alone",
        "s = scale[row, g_idx[column]]",
        "drop g_idx if it holds a -1 anywhere: then all columns are in column order",
    ),
    "round_before_subtract": Remedy(
        "q s and z s rounded before they are subtracted",
        "w = q * s - z * s",
        "subtract the integers and multiply once: `(q - z) * s`",
    ),
    "scale_rounded": Remedy(
        "the scale rounded to another dtype, as in engines that keep scales in the model's dtype",
        "w = (q - z) * scale.to(x.dtype)",
        "multiply in the scale's dtype, and cast the product",
    ),
    "low_precision_accumulate": Remedy(
        "sums in float16 or bfloat16, one by one or block by block",
        "acc = tl.zeros((M, N), dtype=tl.float16)",
        "sum in float32, also where blocks are added up, and cast once at the end",
    ),
    "adapter_minus_one_indexed": Remedy(
        "-1 used as an index: the last adapter, or the first",
        "a = lora_a[adapter_ids]",
        "leave tokens with -1 out: `torch.where((adapter_ids >= 0)[:, None], delta, 0)`",
    ),
    "masked_by_multiplication": Remedy(
        "deltas multiplied by 0 instead of left out: NaN and infinity of an adapter reach tokens "
        "that do not use it",
        "y += (adapter_ids == i) * delta",
        "select, since 0 times NaN is NaN: `torch.where(adapter_ids == i, delta, 0)`",
    ),
    "scaling_missing": Remedy(
        "1 used instead of the scaling",
        "y += h @ b.T",
        "multiply by the scaling of each token's adapter",
    ),
    "scaling_twice": Remedy(
        "the square used instead of the scaling",
        "y += scaling * (h @ (scaling * b).T)",
        "multiply once: in b when it is loaded, or in the delta",
    ),
    "slices_swapped": Remedy(
        "a slice's delta at another slice's place",
        "y[:, i * width : (i + 1) * width] += delta",
        "write at the slice's `start`",
    ),
    "tail_lost": Remedy(
        "inputs, outputs or tokens beyond a multiple of 4 to 128 left out, or not written",
        "for k in range(K // BLOCK)",
        "run over `cdiv(K, BLOCK)` blocks, and mask the loads and stores of the last",
    ),
    "stale_adapter_ids": Remedy(
        "the ids of an earlier call with as many tokens used, of this case or of another",
        "graphs[len(x)].replay()",
        "copy the ids into the graph's input before each replay: `static_ids.copy_(adapter_ids)`",
    ),
    "expert_adapters_dropped": Remedy(
        "the adapters of experts left out, of all layers or of one",
        "y = fused_experts(x, w13, w2, topk_weights, topk_ids)",
        "add each expert's adapters to both of its layers, or refuse adapters on experts",
    ),
    "expert_and_adapter_swapped": Remedy(
        "the pair of an expert and an adapter looked up with the two exchanged",
        "a = lora_a.flatten(0, 1)[expert * adapters + adapter]",
        "a stack `[adapters, experts, ...]` has the pair at `adapter * experts + expert`",
    ),
    "gate_up_swapped": Remedy(
        "up activated instead of the gate, in the weight, in the adapters or in both; or rows "
        "taken in turn",
        "h = y[:, :inter] * act(y[:, inter:])",
        "the gate is the first half of the rows: `act(y[:, :inter]) * y[:, inter:]`",
    ),
    "weights_before_activation": Remedy(
        "routed weights that multiply x instead of the results, or results instead of x",
        "h = act(gate(p * x)) * up(p * x)",
        "multiply the result of down, or x where `weights_first` is set",
    ),
    "routed_weight_missing": Remedy(
        "results of experts summed without their weights, or with weights divided by their sum",
        "y.index_add_(0, tokens, down)",
        "multiply by the weights as they are given: the router normalises them or does not",
    ),
    "shared_order": Remedy(
        "the pair that PEFT stores for all experts split in the wrong order",
        "b = lora_b.reshape(out, experts, rank)[:, expert]",
        "A has the rows of an expert together, `a.reshape(experts, rank, in)`, B the columns of a "
        "rank, `b.reshape(out, rank, experts)`",
    ),
    "dropped_expert_indexed": Remedy(
        "an expert id of -1 used as an index: the last expert, or the first",
        "w = weights[topk_ids]",
        "leave slots with -1 out",
    ),
    "repeated_expert_once": Remedy(
        "one of two slots with the same expert lost",
        "routing[tokens, topk_ids] = topk_weights",
        "add: `routing.scatter_add_(1, topk_ids, topk_weights)`",
    ),
    "unknown": Remedy(
        "none of these mistakes; the diagnosis lists the wrong tokens, outputs, columns or groups",
        "",
        "run the printed code, and compare the elements that it lists",
    ),
}
"""A remedy for every name of ``IDENTIFIERS``, in their order."""
