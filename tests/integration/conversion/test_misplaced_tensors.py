"""Tensors removed, renamed and moved among shards and index: none is lost with exit code 0."""

import pytest

from int4_lora.integration import Checkpoint
from support.misplaced import COMMANDS, run_trials

THOROUGH = pytest.param(2000, marks=pytest.mark.nightly, id="thorough")


@pytest.mark.parametrize("count", [pytest.param(80, id="short"), THOROUGH])
def test_no_tensor_is_lost_with_exit_code_0(tmp_path, count):
    counts = run_trials(tmp_path, count, "tensors")
    for code in (0, 2):  # some of it does not matter, and much of it is refused
        each = [counts[f"{command} {code}"] for command in COMMANDS]
        assert sum(each) >= count // 5, counts
        assert min(each) >= 1, counts


def test_the_trials_notice_a_checkpoint_that_is_not_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "check_listed", lambda checkpoint: None)
    with pytest.raises(AssertionError, match="trial"):
        run_trials(tmp_path, 80, "tensors")
