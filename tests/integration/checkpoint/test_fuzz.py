"""Two thousand spoiled checkpoints and adapters: read or refused in words, quickly, in little."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.checkpoints import shard

TESTS = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "support.fuzz"]


@pytest.mark.parametrize("layout", ["one file", "shards"])
def test_spoiled_files_are_read_or_refused_in_words(copied_model, demo_files, layout):
    if layout == "shards":
        shard(copied_model)
    command = [*COMMAND, copied_model, demo_files.adapters["c"], "1000", layout]
    result = subprocess.run(
        command, cwd=TESTS, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["peak_bytes"] < 2**30
    assert found["ValueError"] > 200  # the spoiling does spoil
    assert found["read"] > 50  # and some of it does not matter
