"""Make a second environment, for packages that conflict with those of the first.

``python .ci/environment_beside.py FOLDER PACKAGE...`` installs the packages and the wheel that tox
built (TOX_PACKAGE) into a virtual environment in FOLDER. If FOLDER already has an environment with
these packages, only the wheel is installed again.

Used by tox: llm-compressor 0.14 pins compressed-tensors 0.19, and vLLM 0.32 pins 0.17.
"""

import os
import subprocess
import sys
from pathlib import Path

from install_vllm import CUDA_ONLY

PIP_INSTALL = Path(__file__).with_name("pip_install.py")


def main(folder, packages):
    """Make the environment, or install the new wheel into an existing one."""
    python, done = Path(folder) / "bin" / "python", Path(folder) / "installed.txt"
    built = os.environ["TOX_PACKAGE"].split(os.pathsep)
    if done.is_file() and done.read_text().split() == packages:
        again = ["install", "--quiet", "--force-reinstall", "--no-deps", *built]
        subprocess.run([python, "-m", "pip", *again], check=True)
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    subprocess.run([python, PIP_INSTALL, "--quiet", *packages, *built], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "--yes", *CUDA_ONLY], check=True)
    done.write_text("\n".join(packages))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
