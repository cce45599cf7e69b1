"""Faults planted in the reference: those that INT4 + LoRA code in the field has had.

The tests of the reference must notice each one, and the oracle must name those that it knows.
"""

BOUNDS = "reference/test_bounds_constructed.py::"
DEQUANTIZATION = "reference/test_dequantization.py::EveryFormat"
DELTA = "reference/test_lora.py::test_the_delta_by_hand"
MOE = "reference/test_moe.py::"
MOE_BOUNDS = "reference/test_moe_bounds.py::"
PACKING = "reference/test_packing.py::KnownWords"
FLOAT4 = "reference/test_float4.py::test_values_by_hand"
ROWS = "reference/test_packed_weight.py::EveryFormat"

# name: (module, {right: wrong}, the test that must notice)
MUTANTS = {
    "nibble_order": (
        "packing",
        {
            "(32 // bits, dtype=torch.int32, device=packed.device)": (
                "(32 // bits, dtype=torch.int32, device=packed.device).flip(0)"
            ),
            "(per_word, dtype=torch.int32, device=codes.device)": (
                "(per_word, dtype=torch.int32, device=codes.device).flip(0)"
            ),
        },
        PACKING,
    ),
    "offset": ("packing", {":size] + low)": ":size] + low + 1)"}, PACKING),
    "missing_mask": ("packing", {" & (2**bits - 1)": ""}, PACKING),
    "zero_point_sign": (
        "dequantization",
        {"return codes - zero_point": "return codes + zero_point"},
        DEQUANTIZATION,
    ),
    "zero_point_axis": (
        "dequantization",
        {"bits=weight.bits, dim=0)": "bits=weight.bits, dim=0).T.reshape(weight.out_features, -1)"},
        DEQUANTIZATION,
    ),
    "g_idx_ignored": (
        "dequantization",
        {"if weight.g_idx is not None and not weight.column_order:": "if False:"},
        DEQUANTIZATION,
    ),
    "groups_reversed": (
        "dequantization",
        {"columns // (weight.in": "columns.flip(0) // (weight.in"},
        DEQUANTIZATION,
    ),
    "g_idx_column_order": (
        "dequantization",
        {"weight.g_idx.to(torch.int64)": "weight.g_idx.to(torch.int64).sort().values"},
        DEQUANTIZATION,
    ),
    "round_before_subtract": (
        "dequantization",
        {
            "    dense = centred_codes(weight).to(scale.dtype) * scale\n": (
                "    codes = unpack(weight.packed, weight.in_features, bits=weight.bits)\n"
                "    zero_point = codes.to(torch.int16) - centred_codes(weight)\n"
                "    dense = codes.to(scale.dtype) * scale - zero_point.to(scale.dtype) * scale\n"
            )
        },
        DEQUANTIZATION,
    ),
    "tail_lost": (
        "dequantization",
        {
            "    return dense if dtype is None": (
                "    dense[:, weight.in_features // 8 * 8 :] = 0\n    return dense if dtype is None"
            )
        },
        DEQUANTIZATION,
    ),
    "awq_order_ignored": (
        "awq",
        {", 8)[:, :, PLACES].flatten(1)": ", 8).flatten(1)"},
        "reference/test_awq.py::test_known_words",
    ),
    "gptq_zero_plus_one": (
        "gptq",
        {"zero_point = stored + int(zero_plus_one)": "zero_point = stored"},
        "reference/test_gptq.py::test_known_words",
    ),
    "packed_along_inputs": (
        "gptq",
        {"packed=qweight.T.contiguous()": "packed=qweight.reshape(rows, -1)"},
        "reference/test_gptq.py::test_known_words",
    ),
    "adapter_minus_one_indexed": (
        "lora",
        {"(adapter_ids == adapter)": "(adapter_ids % lora.adapters == adapter)"},
        DELTA,
    ),
    "g_idx_minus_one_indexed": (
        "dequantization",
        {"weight.g_idx is not None and not weight.column_order:": "weight.g_idx is not None:"},
        DEQUANTIZATION,
    ),
    "masked_by_multiplication": (
        "lora",
        {
            "h = torch.where(chosen, torch.where(chosen, x, 0).to(accumulate) @ a.T, h)": (
                "h = h + chosen * (torch.where(chosen, x, 0).to(accumulate) @ a.T)"
            ),
            "delta = torch.where(chosen, product, delta)": "delta = delta + chosen * product",
        },
        "reference/test_lora.py::test_an_adapter_of_nan_touches_its_own_tokens_only",
    ),
    "scaling_missing": (
        "lora",
        {"product = scaling * (torch": "product = (torch"},
        DELTA,
    ),
    "scaling_twice": (
        "lora",
        {"product = scaling * (torch": "product = scaling * scaling * (torch"},
        DELTA,
    ),
    "slices_swapped": (
        "linear",
        {
            "for part in slices:\n        delta =": (
                "for part, at in zip(slices, slices[::-1]):\n        delta ="
            ),
            "(part.start, weight.out_features - part.stop)": (
                "(at.start, weight.out_features - at.start - part.stack.out_features)"
            ),
        },
        "reference/test_linear.py::test_slices_write_their_own_outputs",
    ),
    "fp4_nibble_order": (
        "float4",
        {"[packed & 0xF, packed >> 4], dim=2": "[packed >> 4, packed & 0xF], dim=2"},
        FLOAT4,
    ),
    "fp4_sign": (
        "float4",
        {
            ", -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)": (
                ", 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)"
            )
        },
        FLOAT4,
    ),
    "fp4_table": (
        "float4",
        {
            "2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)": (
                "2.0, 2.5, 3.0, 3.5, -0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0, -3.5)"
            )
        },
        FLOAT4,
    ),
    "global_scale_missing": (
        "float4",
        {"    return product / weight.global_scale.to(torch.float64)": "    return product"},
        FLOAT4,
    ),
    "global_scale_multiplied": (
        "float4",
        {"return product / weight": "return product * weight"},
        FLOAT4,
    ),
    "e8m0_bias": ("float4", {"(1023 - 127)": "(1023 - 126)"}, FLOAT4),
    "gradients_leak": (
        "lora",
        {"torch.where(chosen, x, 0).to": "x.to"},
        "reference/test_linear.py::test_gradients_of_one_adapter_and_token_reach_no_other",
    ),
    "merge_of_the_first_slice": (
        "merging",
        {"for part in slices:": "for part in slices[:1]:"},
        "reference/test_merging.py::test_two_slices_are_both_merged",
    ),
    "rounded_twice": (
        "merging",
        {"return round_once(": "return (lambda value, dtype: value.to(dtype))("},
        "reference/test_merging.py::EveryFormat::test_merge_rounds_once_24_group_sym_4bit_fp16",
    ),
    "round_before_zero_point": (
        "quantization",
        {"(w / s[pick] + zero_point[pick])": "((w / s[pick]).round() + zero_point[pick])"},
        "reference/test_quantization.py::test_a_tie_is_rounded_after_the_zero_point_is_added",
    ),
    "quantised_in_float32": (
        "quantization",
        {"w = weight if weight.dtype == torch.float64 else weight": "w = weight"},
        "reference/test_quantization.py::test_float64_weights_are_divided_in_float64",
    ),
    "bound_without_bias": (
        "bounds",
        {"base + bias.abs()": "base + 0 * bias"},
        f"{BOUNDS}test_the_magnitude_of_the_bias_counts",
    ),
    "bound_without_joins": (
        "bounds",
        {" + (delta.rank > 0) + (bias is not None)": ""},
        f"{BOUNDS}test_the_addition_of_the_bias_counts",
    ),
    "bound_without_rank": (
        "bounds",
        {"in_features + delta.rank +": "in_features +"},
        f"{BOUNDS}test_the_rank_counts_when_the_expand_is_added_term_by_term",
    ),
    "bound_without_scaling": (
        "bounds",
        {"gamma(n + 2, sums.u) * delta.sum": "gamma(n, sums.u) * delta.sum"},
        f"{BOUNDS}test_the_roundings_of_the_scaling_count",
    ),
    "bound_without_scale_on_sums": (
        "bounds",
        {"(0 if weight_rounded else 3 if is_fp4 else 2)": "0"},
        f"{BOUNDS}test_a_scale_applied_to_the_sum_is_one_more_rounding",
    ),
    "bound_without_underflow": (
        "bounds",
        {"(n + delta.underflows + lost)": "n"},
        f"{BOUNDS}test_products_that_underflow_before_the_scaling",
    ),
    "bound_without_output_underflow": (
        "bounds",
        {"(exact.abs() + error) + output.output_underflow": "(exact.abs() + error)"},
        f"{BOUNDS}test_the_result_may_be_rounded_to_a_subnormal",
    ),
    "bound_without_base_overflow": (
        "bounds",
        {"rounded >= output.": "rounded * 0 > output."},
        f"{BOUNDS}test_a_rounded_base_may_overflow",
    ),
    "bound_without_sum_overflow": (
        "bounds",
        {"(largest + error >= inside.overflow)": "(error.isnan())"},
        f"{BOUNDS}test_products_that_underflow_before_the_scaling",
    ),
    "rows_without_their_zero_points": (
        "packed_weight",
        {"pack(unpacked[index],": "pack(unpacked[: len(index)],"},
        ROWS,
    ),
    "rows_of_other_blocks": (
        "packed_weight",
        {"blocks = block_of_row[::size]": "blocks = block_of_row[::size] * 0"},
        ROWS,
    ),
    "rows_of_slices_from_their_start": (
        "lora_stack",
        {
            "LoRASlice(dataclasses.replace(part.stack, b=b), first)": (
                "LoRASlice(dataclasses.replace(part.stack, b=b), part.start)"
            )
        },
        "reference/test_lora.py::test_rows_of_slices_write_what_the_slices_write_there",
    ),
    "gate_up_swapped": (
        "moe",
        {"gate, up = gate_up.chunk": "up, gate = gate_up.chunk"},
        f"{MOE}test_one_weight_by_hand",
    ),
    "routed_weight_missing": (
        "moe",
        {"y = p[tokens, slots] * y": "y = 1 * y"},
        f"{MOE}test_one_weight_by_hand",
    ),
    "weights_before_activation": (
        "moe",
        {"if weights_first:": "if True:", "if not weights_first:": "if False:"},
        f"{MOE}test_one_weight_by_hand",
    ),
    "expert_adapters_dropped": (
        "moe",
        {"return int4_lora_linear(x, weight, slices, ids) if slices else": "return"},
        f"{MOE}test_adapters_are_the_merged_weights",
    ),
    "expert_and_adapter_swapped": (
        "moe",
        {
            "    slices = () if lora is None else lora.slices(name, expert)\n": (
                "    slices, other = () if lora is None else lora.slices(name, expert), ids\n"
                "    flat = expert * (lora.adapters if lora else 1) + ids.clamp(min=0)\n"
                "    if lora is not None:\n"
                "        y = int4_linear(x, weight)\n"
                "        for row in (ids >= 0).nonzero().flatten().tolist():\n"
                "            adapter, other = divmod(int(flat[row]), experts.count)\n"
                "            slices = lora.slices(name, other)\n"
                "            y[row] = int4_lora_linear(\n"
                "                x[row : row + 1], weight, slices or None,\n"
                "                torch.tensor([adapter]) if slices else None\n"
                "            )[0]\n"
                "        return y\n"
            ),
        },
        f"{MOE}test_adapters_are_the_merged_weights",
    ),
    "dropped_expert_indexed": (
        "moe",
        {"if expert >= 0:": "if True:"},
        f"{MOE}test_dropped_experts_add_nothing_and_are_not_read",
    ),
    "sum_of_experts_reversed": (
        "moe",
        {"total + results[:, slot]": "total + results[:, -slot]"},
        f"{MOE}test_the_sum_is_in_the_order_of_the_slots",
    ),
    "unused_experts_read": (
        "moe",
        {"y = p[tokens, slots] * y": "y = p[tokens, slots] * y + 0 * experts.down[-1].scale.sum()"},
        f"{MOE}test_an_unused_expert_may_be_nan",
    ),
    "bound_without_slope": (
        "moe_bounds",
        {"_slope(g, activation).abs()": "0 * _slope(g, activation)"},
        f"{MOE_BOUNDS}test_the_error_of_the_gate_passes_through_the_activation",
    ),
    "bound_without_curvature": (
        "moe_bounds",
        {" + SHARPEST[activation] / 2 * gate.error": ""},
        f"{MOE_BOUNDS}test_the_error_of_the_gate_passes_through_the_activation",
    ),
    "bound_without_both_errors": (
        "moe_bounds",
        {" + f.error * up.error": ""},
        f"{MOE_BOUNDS}test_errors_of_gate_and_up_together",
    ),
    "bound_without_the_slack_of_down": (
        "bounds",
        {"error = error + slack @ truth.abs().T": "pass"},
        f"{MOE_BOUNDS}test_a_small_error_of_h_is_carried_by_the_weight_of_down",
    ),
}
