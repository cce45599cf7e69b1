"""The peak memory of a load: the weights, and beside them one layer that is being laid out."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support.layer_loads import ENVIRONMENT, INPUTS, LAYERS, OUTPUTS

PACKED = INPUTS * OUTPUTS // 2
DENSE = 2 * INPUTS * OUTPUTS  # in 16 bits, for scale


def test_one_layer_is_in_memory_twice_at_most(tmp_path):
    """In a process of its own: other tests leave free memory between what they keep."""
    run = subprocess.run(
        [sys.executable, "-m", "support.layer_loads", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    load = json.loads(run.stdout.splitlines()[-1])
    assert load["kept"] == LAYERS
    assert abs(load["stays"]) <= PACKED / 4  # a new layout in place of a checkpoint's, for each
    assert PACKED / 2 <= load["peak"] <= 1.4 * PACKED  # a new layout, and the codes of some rows
    assert load["peak"] < DENSE / 2
