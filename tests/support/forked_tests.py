"""A process that has imported torch and pytest, and runs tests in forks of itself.

A planted fault needs a fresh ``int4_lora``, but no fresh torch, whose import takes most of the
time. Commands and answers are lines of JSON.
"""

import json
import os
import sys
import traceback
from pathlib import Path


def serve():
    """Answer commands ``{"package", "arguments", "output"}`` with pytest's exit codes."""
    import pytest
    import torch  # noqa: F401
    import typer.testing  # noqa: F401

    assert "int4_lora" not in sys.modules
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if not child:
            _become(pytest.main, **command)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def _become(main, package, arguments, output):
    """Run pytest on the package in a folder, and end this process with its exit code."""
    code = 70
    try:
        with Path(output).open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ["PYTHONPATH"] = package  # for processes that tests start
        sys.path.insert(0, package)
        code = int(main(arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
