"""A sharded checkpoint of 40 GB opens from its headers; inspecting holds one scale at a time."""

import json
import subprocess
import sys
from pathlib import Path

from support.sparse import make_sparse

MEASURE = """
import json, sys
from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint.inspect import inspect
from support.memory import peak_bytes

open_checkpoint(sys.argv[2])  # imports what there is to import
before = peak_bytes()
large = open_checkpoint(sys.argv[1])
opened = peak_bytes() - before
report = inspect(open_checkpoint(sys.argv[2]))
print(json.dumps({
    "large_modules": len(large.modules()), "open_bytes": opened, "peak": peak_bytes(),
    "modules": len(report.modules), "bytes": sum(module.nbytes for module in report.modules),
    "zero_scales": sum(module.zero_scales for module in report.modules),
}))
"""
TESTS = Path(__file__).parents[2]
SIZE = 11776


def test_large_checkpoints_take_little_memory(tmp_path):
    assert make_sparse(tmp_path / "large", layers=84, size=SIZE) > 40e9
    total = make_sparse(tmp_path / "small", layers=2, size=SIZE)
    command = [sys.executable, "-c", MEASURE, tmp_path / "large", tmp_path / "small"]
    result = subprocess.run(
        command, cwd=TESTS, capture_output=True, text=True, check=True, timeout=300
    )
    measured = json.loads(result.stdout)
    assert measured["large_modules"] == 84 * 7
    assert measured["open_bytes"] < 300 * 2**20
    assert measured["peak"] < 2**30
    assert measured["modules"] == 2 * 7
    assert measured["bytes"] == total - 16 * measured["modules"]  # weight_shape is not counted
    assert measured["zero_scales"] == measured["modules"] * SIZE * SIZE // 128
