"""The wheel holds what the tree holds, file for file."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {"package": "", "reference": "reference/", "compiled": "compiled/"}
FOLDERS["integration"] = "integration/"


def test_the_wheel_holds_the_tree(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, tree], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("int4_lora-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        built = {name: archive.read(name) for name in archive.namelist()}
    expected = {
        f"int4_lora/{inside}{file.relative_to(tree / folder).as_posix()}": file.read_bytes()
        for folder, inside in FOLDERS.items()
        for file in (tree / folder).rglob("*")
        if file.is_file()
    }
    assert "int4_lora/py.typed" in expected
    (info,) = {name.split("/")[0] for name in built} - {"int4_lora"}
    assert {name: data for name, data in built.items() if name.startswith("int4_lora/")} == expected
    assert f"{info}/licenses/LICENSE" in built
    assert b"int4-lora = int4_lora.integration.cli:main" in built[f"{info}/entry_points.txt"]
