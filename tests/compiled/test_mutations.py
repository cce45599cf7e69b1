"""Faults planted in a copy of the compiled path: each must make a test of this suite fail."""

import pytest

from support.planting import check_noticed

FORMULATIONS = ["compiled/formulations/test_formulations.py"]
NAN = [f"{FORMULATIONS[0]}::test_a_nan_stays_with_its_own_tokens"]
TOKENS = [f"{FORMULATIONS[0]}::test_tokens_and_dtypes"]
RANKS = [f"{FORMULATIONS[0]}::EveryFormulation"]
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
        "formulations.int4pack_tiles",
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
        "formulations.int4pack_tiles", {"torch.stack(both, dim=3)": "torch.stack(both, dim=2)"},
        ["compiled/formulations/test_int4pack_tiles.py"],
    ),
    "columns_not_arranged": (
        "formulations.tiles", {"x = weight.arrange(x)": "pass"}, FORMULATIONS,
    ),
    "zero_points_of_the_wrong_row": (
        "layouts.interleaved", {"(4 * (row % ZEROS))": "(4 * ((row + 1) % ZEROS))"}, WEIGHTS,
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
        "gradients", {"weight.order is not None": "False"}, ["compiled/test_gradients.py"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_fails_a_test(tmp_path, name):
    module, changes, files = MUTANTS[name]
    check_noticed(tmp_path, f"compiled.{module}", changes, files)
