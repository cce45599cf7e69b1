"""Faults planted in a copy of the installed package, and tests run against the copy."""

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
OTHERS = ["reference", "compiled", "integration"]  # folders of the umbrella that are packages too
PACKAGES = ["int4_lora", *(f"int4_lora.{name}" for name in OTHERS)]


def plant(folder, module="", changes=None):
    """Copy the installed package into ``folder`` and change one module of it."""
    for package in PACKAGES:
        source = Path(importlib.import_module(package).__file__).parent
        target = folder.joinpath(*package.split("."))
        ignored = shutil.ignore_patterns("__pycache__", *([] if "." in package else OTHERS))
        shutil.copytree(source, target, ignore=ignored)
    for right, wrong in (changes or {}).items():
        file = folder.joinpath("int4_lora", *module.split(".")).with_suffix(".py")
        text = file.read_text()
        assert right in text, f"{module} no longer holds {right!r}: mend this mutant"
        file.write_text(text.replace(right, wrong))


def run(folder, *arguments):
    """Run Python with the planted package in front of the installed one."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )


def run_tests(folder, files):
    """Run test files against the planted package, until one fails."""
    arguments = ["-x", "-q", "-p", "no:cacheprovider", *(str(TESTS / file) for file in files)]
    if sys.platform != "linux":
        return run(folder, "-m", "pytest", *arguments)
    server, output = _server(), folder / "output"
    command = {"package": str(folder), "arguments": arguments, "output": str(output)}
    server.stdin.write(json.dumps(command) + "\n")
    server.stdin.flush()
    code = json.loads(server.stdout.readline())
    return subprocess.CompletedProcess(arguments, code, output.read_text(), "")


@functools.cache
def _server():
    """Return the process of this one that forks; it ends when its input is closed."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.Popen(
        [sys.executable, "-m", "support.forked_tests"],
        env=environment,
        cwd=TESTS.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def check_noticed(folder, module, changes, files):
    """Check that a fault makes a test fail, and not because it is no Python."""
    plant(folder, module, changes)
    result = run_tests(folder, files)
    assert result.returncode == 1, f"no test noticed {changes}:\n{result.stdout}{result.stderr}"
    assert "SyntaxError" not in result.stdout
    assert "NameError" not in result.stdout
