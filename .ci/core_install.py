"""Install the core beside an existing torch; fail if pip changes any installed package.

Run by ``tox run -e core211`` in an environment that holds torch and what torch needs.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "install"]
WORKS = """
import torch
from int4_lora.integration import unpack_int4_weights
from int4_lora.reference import dequantize, int4_linear, quantize
weight = quantize(torch.randn(8, 128, dtype=torch.float16), group_size=32)
dense = unpack_int4_weights(weight.packed, weight.scale, shape=weight.shape)
assert torch.equal(dense, dequantize(weight))
assert int4_linear(torch.ones(2, 128, dtype=torch.float16), weight).shape == (2, 8)
"""


def changed(report, installed):
    """Return the installed packages that pip would change, as ``name old -> new``."""
    wanted = {
        canonicalize_name(one["metadata"]["name"]): one["metadata"]["version"]
        for one in report["install"]
    }
    return [
        f"{name} {installed[name]} -> {wanted[name]}"
        for name in sorted(wanted.keys() & installed.keys())
    ]


def found_now():
    """Return the versions of all installed packages."""
    return {canonicalize_name(one.metadata["Name"]): one.version for one in distributions()}


def main():
    """Plan the install, install, and use the core; exit with a message if pip changes a package."""
    installed = found_now()
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / "source"  # a build leaves files in its source folder
        shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
        report = Path(folder) / "report.json"
        asked = ["--dry-run", "--quiet", "--report", str(report), str(copied)]
        subprocess.run([*PIP, *asked], check=True)
        plan = json.loads(report.read_text())
        conflicts = changed(plan, installed)
        if conflicts:
            sys.exit(f"installing the core would change {', '.join(conflicts)}")
        print("would install", ", ".join(one["metadata"]["name"] for one in plan["install"]))
        subprocess.run([*PIP, "--quiet", str(copied)], check=True)
    after = found_now()
    touched = [name for name, old in installed.items() if after.get(name) != old]
    if touched:
        sys.exit(f"pip changed {', '.join(touched)} after all")
    subprocess.run([sys.executable, "-c", WORKS], check=True, cwd="/")
    doctor = str(Path(sys.executable).with_name("int4-lora"))
    subprocess.run([doctor, "doctor"], check=True, cwd="/")


if __name__ == "__main__":
    main()
