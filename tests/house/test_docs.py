"""The documentation: what it names exists, what it shows runs, what it lists is complete."""

import configparser
import itertools
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from typer.main import get_command

from int4_lora.integration.cli.app import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
COMMANDS = get_command(app).commands
CITED = re.compile(r"`(test_\w+\.py)::(\w+)`")


def test_every_statement_of_the_format_has_a_test_that_exists():
    text = (DOCS / "format.md").read_text()
    statements = re.findall(r"^- (.*?)(?=^- |^\|?$|\Z)", text, flags=re.M | re.S)
    assert len(statements) > 40
    for statement in statements:
        assert statement.rstrip().endswith(")"), statement
    assert_cites_tests(statements)


def assert_cites_tests(passages):
    """Check that each passage names tests, and that all of them exist."""
    files = defaultdict(str)  # by name: folders may have files of one name
    for file in (ROOT / "tests").rglob("test_*.py"):
        files[file.name] += file.read_text()
    for passage in passages:
        cited = CITED.findall(passage)
        assert cited, passage
        for file, name in cited:
            assert re.search(rf"^\s*(def|class) {name}\(", files[file], flags=re.M), (file, name)


def test_every_public_layout_has_its_reports_and_a_test_that_exists():
    rows = re.findall(r"^\| (.+) \|$", (DOCS / "layouts.md").read_text(), flags=re.M)
    rows = [row for row in rows if not row.startswith(("report ", "---"))]
    assert len(rows) > 30
    for row in rows:
        reports, layout, done, _ = row.split(" | ")
        assert all(re.fullmatch(r"[\w./-]+#\d+", report) for report in reports.split(", ")), row
        assert layout
        assert done
    assert_cites_tests(rows)


def test_everything_that_is_read_or_refused_of_an_adapter_has_a_test_that_exists():
    rows = re.findall(r"^\| (.+) \|$", (DOCS / "adapters.md").read_text(), flags=re.M)
    rows = [row for row in rows if "`" in row and not row.endswith(" | test")]
    assert len(rows) > 25
    assert_cites_tests(rows)


def test_everything_that_the_vllm_backend_does_or_refuses_has_a_test_that_exists():
    lines = (DOCS / "vllm.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    headers = [above for above, line in itertools.pairwise(lines) if line.startswith("|---")]
    assert len(headers) == 6
    assert all(header.endswith(" | test |") for header in headers)
    rows = [row.rpartition(" | ")[2] for row in rows if row not in headers]
    assert len(rows) > 35
    assert_cites_tests(rows)


def test_every_environment_of_the_matrix_has_its_row():
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    labels = tox["tox"]["labels"].replace("\\\n", "").strip().splitlines()
    (matrix,) = (
        names for name, _, names in (line.partition(" = ") for line in labels) if name == "matrix"
    )
    page = (DOCS / "compatibility.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .*\| (?:passed|\*\*failed\*\*) \|$", page, flags=re.M)
    assert sorted(rows) == sorted(name.strip() for name in matrix.split(","))


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_page_with_its_options_and_an_example(name):
    page = (DOCS / "commands" / f"{name}.md").read_text()
    parts = list(getattr(COMMANDS[name], "commands", {name: COMMANDS[name]}).values())
    parameters = [each for part in parts for each in part.params]
    options = {option for each in parameters for option in each.opts if option.startswith("--")}
    documented = set(re.findall(r"^\| `(--[a-z-]+)", page, flags=re.M))
    assert documented == options
    assert f"$ int4-lora {name}" in page
    assert f"({name}.md)" in (DOCS / "commands" / "README.md").read_text()
    assert all("Example: int4-lora" in part.help for part in parts)


@pytest.fixture
def desk(tmp_path, demo_files):
    """Return a folder laid out as the quickstart says."""
    (tmp_path / "model").symlink_to(demo_files.model)
    (tmp_path / "sql-lora").symlink_to(demo_files.adapters["a"])
    return tmp_path


def test_the_quickstart_runs(desk):
    text = (DOCS / "quickstart.md").read_text()
    text += (DOCS / "compiled.md").read_text()  # which goes on with the same names
    programs = "".join(re.findall(r"```python\n(.*?)```", text, flags=re.S))
    subprocess.run([sys.executable, "-c", programs], check=True, cwd=desk)
    lines = re.findall(r"^\$ (int4-lora .*)$", text, flags=re.M)
    assert len(lines) == 3
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in lines:
        subprocess.run(line.split(), check=True, cwd=desk, env={**os.environ, "PATH": path})


def test_the_page_of_owners_runs(tmp_path):
    page = (DOCS / "owning-checkpoints.md").read_text()
    programs = "".join(re.findall(r"```python\n(.*?)```", page, flags=re.S))
    command = [sys.executable, "-c", programs]
    said = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    lost = float(re.findall(r"lost in INT4: (.*)", said)[0])
    assert 0.05 < lost < 0.2
    names = {"cache", "dense", "merged", "merged-w4a16"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert (tmp_path / "merged-w4a16/lora_metadata.json").is_file()


def test_the_page_of_conformance_runs():
    """Its backend conforms, its classes and functions are tests, its snippet holds."""
    from int4_lora.reference.conformance import Backend, run, select

    page = (DOCS / "conformance.md").read_text()
    space = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S):
        exec(block, space)
    found = list(run(Backend(space["Backend"](), "page"), select("int4_linear/ragged*/*")))
    assert {one.status for one in found} == {"passed", "skipped"}
    assert hasattr(space["TestMyKernels"], "test_case_000_pack_all_codes")


def test_the_page_of_conformance_lists_every_name_and_claim():
    import dataclasses

    from int4_lora.reference.conformance import FUNCTIONS, IDENTIFIERS, REMEDIES, Manifest

    page = (DOCS / "conformance.md").read_text()
    rows = set(re.findall(r"`([a-z0-9_]+)", "\n".join(re.findall(r"^\| `.*?\|", page, flags=re.M))))
    for name, remedy in REMEDIES.items():
        line = f"`{remedy.line}`" if remedy.line else ""
        assert f"| `{name}` | {remedy.meaning} | {line} | {remedy.fix} |" in page
    assert list(REMEDIES) == list(IDENTIFIERS)
    claims = {field.name for field in dataclasses.fields(Manifest)}
    assert {*IDENTIFIERS, *claims, *FUNCTIONS} <= rows


def test_every_symbol_of_vllm_that_is_relied_on_is_listed():
    from int4_lora.integration.vllm_plugin.contract import ATTRIBUTES, SYMBOLS

    symbols, attributes = (DOCS / "vllm-maintainers.md").read_text().split("| attributes | why |")
    listed = {
        (module, name, parameters, why)
        for module, names, parameters, why in rows_of_vllm(symbols)
        for name in names.split(", ")
    }
    assert listed == {
        (symbol.module, symbol.name, ", ".join(symbol.parameters) or "-", symbol.why)
        for symbol in SYMBOLS
    }
    listed = {
        (module, owner, name, why)
        for module, owner, names, why in rows_of_vllm(attributes)
        for name in names.split(", ")
    }
    assert listed == {
        (attribute.module, attribute.owner, attribute.name, attribute.why)
        for attribute in ATTRIBUTES
    }
    assert all(item.why for item in (*SYMBOLS, *ATTRIBUTES))


def rows_of_vllm(text):
    """Return the cells of each row of a table that starts with a module of vLLM."""
    lines = [line for line in text.splitlines() if line.startswith("| `vllm.")]
    return [line.strip("| ").replace("`", "").split(" | ") for line in lines]


def test_every_file_of_the_vllm_backend_is_described():
    page = (DOCS / "vllm-maintainers.md").read_text()
    files = {file.name for file in (ROOT / "integration" / "vllm_plugin").glob("[a-z]*.py")}
    assert files <= set(re.findall(r"`(\w+\.py)`", page))
