"""Faults planted in a copy of the reference: each must make a test of this suite fail.

A fault that no test notices is a hole in the suite, whatever its coverage says.
"""

from pathlib import Path

import pytest

from support.planting import check_noticed, plant, run, run_tests
from support.reference_mutants import MUTANTS


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_fails_a_test(tmp_path, name):
    module, changes, test = MUTANTS[name]
    check_noticed(tmp_path, f"reference.{module}", changes, [test])


def test_the_copy_is_what_runs_and_passes_when_nothing_is_planted(tmp_path):
    plant(tmp_path)
    where = run(tmp_path, "-c", "import int4_lora.reference as r; print(r.__file__)").stdout
    assert Path(where.strip()).is_relative_to(tmp_path)
    result = run_tests(tmp_path, sorted({test for _, _, test in MUTANTS.values()}))
    assert result.returncode == 0, result.stdout + result.stderr
