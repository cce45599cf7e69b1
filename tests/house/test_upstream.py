"""Each reproduction of docs/upstream.md prints what the page says, where its packages are."""

import contextlib
import io
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

PAGE = (Path(__file__).parents[2] / "docs" / "upstream.md").read_text()
BLOCK = re.compile(r"^```python needs=(\S+)\n(.*?)^```\n\n^```text\n(.*?)^```", re.M | re.S)
SECTIONS = PAGE.split("\n## ")[1:]
BLOCKS = [
    pytest.param(*match.groups(), id=section.splitlines()[0])
    for section in SECTIONS
    for match in BLOCK.finditer(section)
]
MOST_LINES = 20


def is_met(need):
    """Return whether a package is there, in a version that has the fault, or the CPU has it."""
    if need == "cpu-without-avx512_bf16":
        return platform.machine() == "x86_64" and not torch.cpu._is_avx512_bf16_supported()
    requirement = Requirement(need)
    if find_spec(requirement.name) is None:
        return False
    with contextlib.suppress(PackageNotFoundError):
        return not requirement.specifier or version(requirement.name) in requirement.specifier
    return not requirement.specifier


@pytest.mark.versions
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("needs", "program", "prints"), BLOCKS)
def test_a_reproduction(needs, program, prints, tiny_models):
    missing = [need for need in needs.split(",") if not is_met(need)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(program, "docs/upstream.md", "exec"), {"MODEL": str(tiny_models["g128"])})
    assert output.getvalue() == prints


@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text.splitlines()[0])
def test_each_fault_has_versions_a_short_reproduction_and_a_report(section):
    assert "Versions:" in section
    assert "\n> **" in section
    programs = re.findall(r"^```(?:python|console)[^\n]*\n(.*?)^```", section, re.M | re.S)
    assert programs
    assert all(len(program.splitlines()) <= MOST_LINES for program in programs)
