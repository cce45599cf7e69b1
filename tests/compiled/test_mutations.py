"""Faults planted in a copy of the compiled path: each must make a test of this suite fail."""

import pytest

from support.planting import check_noticed

FORMULATIONS = ["compiled/formulations/test_formulations.py"]
NAN = [f"{FORMULATIONS[0]}::test_a_nan_stays_with_its_own_tokens"]
TOKENS = [f"{FORMULATIONS[0]}::test_tokens_and_dtypes"]
RANKS = [f"{FORMULATIONS[0]}::EveryFormulation"]
SPLIT_K = "compiled/formulations/test_split_k.py"
BASE = "compiled/gradients/test_base.py"
ADAPTER = "compiled/gradients/test_adapter.py"
BLOCKS = ["compiled/graphs/test_blocks.py::test_the_layer_is_within_its_bound"]
WEIGHTS = ["compiled/layouts/test_layouts.py"]

# name: (module, {right: wrong}, tests, one of which must fail)
MUTANTS = {
    "ids_of_no_adapter_use_the_first": (
        "adapters.terms",
        {"return torch.where(own.unsqueeze(1), delta, 0)": "return delta"},
        FORMULATIONS,
    ),
    "nan_of_b_reaches_others_gathered": (
        "adapters.terms",
        {"return torch.where(own.unsqueeze(1), delta, 0)": "return delta * own.unsqueeze(1)"},
        NAN,
    ),
    "the_next_column_of_a_slice": (
        "adapters.terms", {"+ -start % width) % width": "+ start % width) % width"},
        ["compiled/adapters/test_terms.py"],
    ),
    "a_gradient_of_the_last_block": (
        "graphs.blocks", {"beta = 1\n": "beta = 0\n"},
        ["compiled/graphs/test_blocks.py::test_the_gradient_of_x_is_summed_block_by_block"],
    ),
    "a_zero_point_of_the_next_row": (
        "layouts.interleaved",
        {"return ((numbers >> (4 * (row % 2))[:, None]) & 15) - 8":
         "return ((numbers >> (4 - 4 * (row % 2))[:, None]) & 15) - 8"},
        RANKS,
    ),
    "subnormal_codes_of_fp4": (
        "layouts.float4", {"0xC8643210": "0xC8643221"},
        ["compiled/layouts/test_float4.py"],
    ),
    "a_table_of_fp4_that_rounds_twice": (
        "layouts.float4", {"table = torch.where(is_right(table), table, neighbour)": "pass"},
        ["compiled/layouts/test_float4.py"],
    ),
    "a_scale_of_the_next_group_of_fp4": (
        "layouts.float4", {"yield scale[:, :, :, group, None], pairs":
                           "yield scale[:, :, :, -group - 1, None], pairs"},
        ["compiled/formulations/test_float4.py::test_every_formulation"],
    ),
    "a_pair_of_another_expert": (
        "moe", {"pairs = of_rows * experts + flat": "pairs = of_rows + adapters * flat"},
        ["compiled/test_moe.py::test_rows_are_brought_together_by_expert_and_adapter"],
    ),
    "repeated_groups_count": (
        "formulations.whole_blocks",
        {"torch.where(own, weight.scale.index_select(1, group), 0)":
         "weight.scale.index_select(1, group)"},
        ["compiled/formulations/test_whole_blocks.py"],
    ),
    "a_nibble_of_another_place": (
        "formulations.magic_numbers",
        {"LEFT_SHIFTS = (15, 7, -1, -9)": "LEFT_SHIFTS = (15, 7, -9, -1)"},
        ["compiled/formulations/test_magic_numbers.py"],
    ),
    "zero_points_forgotten_by_magic_gemv": (
        "formulations.magic_gemv", {"if weight.zero_point is not None:": "if False:"}, RANKS,
    ),
    "sums_of_planes_swapped": (
        "formulations.magic_gemv",
        {'total = sums[256.0] * -264.0 + sums[16.0] * -24.0':
         'total = sums[16.0] * -264.0 + sums[256.0] * -24.0'},
        TOKENS,
    ),
    "partial_sums_of_split_k_in_16_bits": (
        "formulations.partial_products",
        {"x.to(torch.float32), w.to(torch.float32)": "x, w"},
        [f"{SPLIT_K}::test_partial_sums_are_float32"],
    ),
    "columns_of_another_unit": (
        "formulations.split_k", {"columns.permute(0, 1, 4, 3, 2, 5)": "columns"},
        [f"{SPLIT_K}::test_groups_and_slices"],
    ),
    "the_first_slice_only": (
        "formulations.split_k", {"range(1, slices)": "range(1, 1)"},
        [f"{SPLIT_K}::test_groups_and_slices"],
    ),
    "kept_for_any_dtype": (
        "selection.choice",
        {'        "x": str(kind.x),\n': ""},
        ["compiled/selection/test_choice.py"],
    ),
    "nan_of_b_reaches_others": (
        "adapters.terms",
        {"return masked if narrow and one.finite": "return masked if narrow"},
        NAN,
    ),
    "grouped_by_the_next_adapter": (
        "adapters.grouping", {"(block >= ends).sum(1)": "(block > ends).sum(1)"},
        ["compiled/adapters/test_grouping.py"],
    ),
    "too_few_blocks": (
        "adapters.grouping", {"+ size - 1) // size + adapters)": "+ size - 1) // size)"},
        ["compiled/adapters/test_grouping.py"],
    ),
    "ties_rounded_up": (
        "rounding",
        {" + ((bits >> 16) & 1)": " + 1"},
        ["compiled/formulations/test_int4pack_tiles.py"],
    ),
    "masked_by_the_wrong_owner": (
        "adapters.terms", {"repeat_interleave(one.rank)": "repeat(one.rank)"},
        [f"{FORMULATIONS[0]}::test_ranks_and_adapters"],
    ),
    "bias_of_the_first_slice": (
        "adapters.terms", {"bias[start:stop]": "bias[: stop - start]"},
        ["compiled/adapters/test_terms.py"],
    ),
    "parts_in_the_order_of_blocks": (
        "formulations.int4pack_tiles", {"torch.stack(halves, dim=4)": "torch.stack(halves, dim=3)"},
        ["compiled/formulations/test_int4pack_tiles.py"],
    ),
    "columns_not_arranged": (
        "formulations.tiles", {"weight.arrange(x.to(dtype))": "x.to(dtype)"}, FORMULATIONS,
    ),
    "columns_not_arranged_for_blocks": (
        "graphs.blocks", {"weight.arrange(x.to(dtype))": "x.to(dtype)"}, BLOCKS,
    ),
    "outputs_of_blocks_in_pairs": (
        "formulations.tiles", {"_in_order(weight.tile) if pairs else None": "None"}, BLOCKS,
    ),
    "zero_points_of_the_first_part": (
        "layouts.interleaved", {"zeros[start // ZEROS : -(-stop // ZEROS)]": "zeros"}, BLOCKS,
    ),
    "zero_points_of_the_wrong_row": (
        "layouts.interleaved", {"(4 * (row % ZEROS))": "(4 * ((row + 1) % ZEROS))"}, WEIGHTS,
    ),
    "zero_points_of_the_first_part_of_8_bits": (
        "layouts.int8", {"self.zero_point[start:stop],": "self.zero_point,"}, BLOCKS,
    ),
    "bytes_of_zero_points_in_another_order": (
        "layouts.int8",
        {"BYTES * words.shape[0], bits=BITS, dim=0)":
         "BYTES * words.shape[0], bits=BITS, dim=0).flip(0)"},
        WEIGHTS,
    ),
    "zero_points_forgotten_by_gemv": (
        "layouts.int8", {"if self.zero_point is None:": "if True:"}, RANKS,
    ),
    "x_as_it_lies_in_memory": (
        "formulations.int8pack", {"_aligned(x), weight.codes": "x, weight.codes"},
        ["compiled/formulations/test_int8pack.py"],
    ),
    "halves_swapped": (
        "formulations.int4pack_tiles",
        {"low, high = (words & 15)": "high, low = (words & 15)"},
        TOKENS,
    ),
    "rows_after_the_blocks_lost": (
        "layouts.int4pack", {"[pairs & 15, pairs >> 4]": "[pairs >> 4, pairs & 15]"}, WEIGHTS,
    ),
    "gradient_of_columns_not_arranged": (
        "gradients.base", {"weight.order is not None": "False"},
        [f"{BASE}::test_every_layout"],
    ),
    "gradient_of_rows_in_order": (
        "gradients.base", {"order.transpose(2, 3).flatten(1)": "order.flatten(1)"},
        [f"{BASE}::test_every_layout"],
    ),
    "partial_sums_of_16_bits": (
        "gradients.base", {"total.to(sums) + part.to(sums)": "total + part"},
        [f"{BASE}::test_partial_sums_are_kept_in_float32"],
    ),
    "weight_of_a_checkpoint_not_rounded": (
        "layouts.checkpoint", {"scaled(codes, scale)": "codes.float() * scale.float()"},
        ["compiled/formulations/test_formulations.py::test_tokens_and_dtypes"],
    ),
    "rounding_left_to_a_cast": (
        "rounding", {"or not torch.compiler.is_compiling()": "or True"},
        ["compiled/test_rounding.py"],
    ),
    "rounding_of_small_numbers_forgotten": (
        "rounding", {"values.abs() < SMALLEST_NORMAL, small": "values.abs() < 0, small"},
        ["compiled/test_rounding.py"],
    ),
    "nan_of_x_reaches_adapters": (
        "gradients.adapter", {"its_x = torch.where(uses, x, 0)": "its_x = x"},
        [f"{ADAPTER}::test_a_nan_stays_with_its_own_tokens_and_adapter"],
    ),
    "delta_of_x_for_every_token": (
        "gradients.adapter", {"torch.where(uses, scaling * (gz @ a.to(sums)), 0)":
                              "scaling * (gz @ a.to(sums))"},
        [f"{ADAPTER}::test_a_nan_stays_with_its_own_tokens_and_adapter"],
    ),
    "gradient_of_a_unscaled": (
        "gradients.adapter", {"(scaling * (gz.T @ its_x.to(sums)))": "(gz.T @ its_x.to(sums))"},
        [f"{ADAPTER}::test_ranks_and_adapters"],
    ),
    "second_order_lost": (
        "gradients.node", {" or torch.is_grad_enabled()\n": "\n"},
        ["compiled/gradients/test_node.py::test_the_backward_can_be_differentiated"],
    ),
    "x_kept_for_nothing": (
        "gradients.node", {"x if reads_x else None": "x"},
        ["compiled/gradients/test_node.py::test_x_is_kept_only_where_an_adapter_needs_it"],
    ),
}  # fmt: skip


SLOW = {  # their tests compile for more than ten seconds
    "a_gradient_of_the_last_block",
    "columns_not_arranged_for_blocks",
    "delta_of_x_for_every_token",
    "nan_of_x_reaches_adapters",
    "outputs_of_blocks_in_pairs",
    "parts_in_the_order_of_blocks",
    "rounding_left_to_a_cast",
    "rounding_of_small_numbers_forgotten",
    "second_order_lost",
    "x_kept_for_nothing",
    "zero_points_of_the_first_part",
    "zero_points_of_the_first_part_of_8_bits",
}
assert set(MUTANTS) >= SLOW


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.nightly] * (name in SLOW)) for name in MUTANTS],
)
def test_a_planted_fault_fails_a_test(tmp_path, name):
    module, changes, files = MUTANTS[name]
    check_noticed(tmp_path, f"compiled.{module}", changes, files)
