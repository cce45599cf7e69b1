"""Faults planted in a copy of the reference: each must make a test of this suite fail.

The faults are those that INT4 + LoRA code in the field has had. A fault that no test notices is
a hole in the suite, whatever its coverage says.
"""

from pathlib import Path

import pytest

from support.planting import check_noticed, plant, run, run_tests

BOUNDS = ["reference/test_bounds_constructed.py"]
DEQUANTIZATION = ["reference/test_dequantization.py", "lora/test_int4_unpacking.py"]

# name: (module, {right: wrong}, test files that must notice)
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
        ["reference/test_packing.py"],
    ),
    "offset": ("packing", {":size] + low)": ":size] + low + 1)"}, ["reference/test_packing.py"]),
    "missing_mask": ("packing", {" & (2**bits - 1)": ""}, ["reference/test_packing.py"]),
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
    "adapter_minus_one_indexed": (
        "lora",
        {"(adapter_ids == adapter)": "(adapter_ids % lora.adapters == adapter)"},
        ["reference/test_lora.py"],
    ),
    "scaling_missing": (
        "lora",
        {"product = scaling * (torch": "product = (torch"},
        ["reference/test_lora.py"],
    ),
    "scaling_twice": (
        "lora",
        {"product = scaling * (torch": "product = scaling * scaling * (torch"},
        ["reference/test_lora.py"],
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
        ["reference/test_linear.py"],
    ),
    "gradients_leak": (
        "lora",
        {"torch.where(chosen, x, 0).to": "x.to"},
        ["reference/test_linear.py"],
    ),
    "merge_of_the_first_slice": (
        "merging",
        {"for part in slices:": "for part in slices[:1]:"},
        ["reference/test_merging.py"],
    ),
    "rounded_twice": (
        "merging",
        {"return round_once(": "return (lambda value, dtype: value.to(dtype))("},
        ["reference/test_merging.py"],
    ),
    "round_before_zero_point": (
        "quantization",
        {"(w / s[pick] + zero_point[pick])": "((w / s[pick]).round() + zero_point[pick])"},
        ["reference/test_quantization.py"],
    ),
    "quantised_in_float32": (
        "quantization",
        {"w = weight if weight.dtype == torch.float64 else weight": "w = weight"},
        ["reference/test_quantization.py"],
    ),
    "bound_without_bias": ("bounds", {"base + bias.abs()": "base + 0 * bias"}, BOUNDS),
    "bound_without_joins": ("bounds", {" + (delta.rank > 0) + (bias is not None)": ""}, BOUNDS),
    "bound_without_rank": ("bounds", {"in_features + delta.rank +": "in_features +"}, BOUNDS),
    "bound_without_scaling": (
        "bounds",
        {"gamma(n + 2, u) * delta.sum": "gamma(n, u) * delta.sum"},
        BOUNDS,
    ),
    "bound_without_scale_on_sums": ("bounds", {"(0 if weight_rounded else 2)": "0"}, BOUNDS),
    "bound_without_underflow": ("bounds", {"(n + delta.underflows + lost)": "n"}, BOUNDS),
    "bound_without_output_underflow": (
        "bounds",
        {"(exact.abs() + error) + output.output_underflow": "(exact.abs() + error)"},
        BOUNDS,
    ),
    "bound_without_base_overflow": (
        "bounds",
        {"rounded >= output.": "rounded * 0 > output."},
        BOUNDS,
    ),
    "bound_without_sum_overflow": (
        "bounds",
        {"(largest + error >= inside.overflow)": "(error.isnan())"},
        BOUNDS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_fails_a_test(tmp_path, name):
    module, changes, files = MUTANTS[name]
    check_noticed(tmp_path, f"reference.{module}", changes, files)


def test_the_copy_is_what_runs_and_passes_when_nothing_is_planted(tmp_path):
    plant(tmp_path)
    where = run(tmp_path, "-c", "import int4_lora.reference as r; print(r.__file__)").stdout
    assert Path(where.strip()).is_relative_to(tmp_path)
    files = sorted({file for _, _, files in MUTANTS.values() for file in files})
    result = run_tests(tmp_path, files)
    assert result.returncode == 0, result.stdout + result.stderr
