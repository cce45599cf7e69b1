"""Run pip install, preferring torch's CPU build on machines without an NVIDIA driver.

torch from PyPI for Linux is a CUDA build: about 3 GB with its libraries, 5 GB on disk. On a
machine without an NVIDIA driver this script adds PyTorch's CPU index, whose builds pip then prefers
(2.13.0+cpu sorts above 2.13.0), if the index answers within a few seconds. If it does not, or if a
folder in PIP_FIND_LINKS already has a CPU build, pip runs with its arguments unchanged.

Used by tox as install_command: python .ci/pip_install.py OPTIONS PACKAGES
"""

import ctypes
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIN = "torch=="
SECONDS = 4


def has_nvidia_driver():
    """Return whether CUDA's driver library can be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def has_local_cpu_build(version):
    """Return whether a folder that pip searches has a CPU build of this torch version."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    folders = os.environ.get("PIP_FIND_LINKS", "").split()
    return any(any(Path(folder).glob(f"torch-{version}+cpu-{python}-*.whl")) for folder in folders)


def cpu_index_answers():
    """Return whether PyTorch's CPU index answers quickly."""
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=SECONDS) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


def extra_options(arguments):
    """Return the options to add to ``pip install`` for these arguments."""
    versions = [word.removeprefix(PIN) for word in arguments if word.startswith(PIN)]
    if not versions or sys.platform != "linux" or has_nvidia_driver():
        return []
    if has_local_cpu_build(versions[0]) or not cpu_index_answers():
        return []
    return ["--extra-index-url", CPU_INDEX]


if __name__ == "__main__":
    options = extra_options(sys.argv[1:])
    command = [sys.executable, "-m", "pip", "install", *options, *sys.argv[1:]]
    sys.exit(subprocess.run(command, check=False).returncode)
