"""The rules of the house that a machine can check: sizes, imports, paths."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ["package", "reference", "compiled", "integration"]
FILES = sorted(file for folder in [*PRODUCT, "tests"] for file in (ROOT / folder).rglob("*.py"))

ALLOWED = {
    "reference": {"torch", "int4_lora.reference"},
    "compiled": {"torch", "int4_lora.reference", "int4_lora.compiled"},
}
# transformers and PEFT only in the package that exists for them, vLLM nowhere yet
ROOMS = {"demo": {"transformers", "peft"}, "vllm_plugin": {"vllm"}}


def parse(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(tree):
    """Yield the full name of every imported module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_are_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("folder", PRODUCT)
def test_functions_are_short(folder):
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 40, f"{file.name}: {node.name} has {lines} lines"


@pytest.mark.parametrize("folder", ALLOWED)
def test_knowledge_flows_one_way(folder):
    for file in (ROOT / folder).rglob("*.py"):
        for name in imports(parse(file)):
            top = name.split(".")[0]
            known = any(name == right or name.startswith(f"{right}.") for right in ALLOWED[folder])
            assert known or top in sys.stdlib_module_names, f"{file}: imports {name}"


def test_guests_stay_in_their_room():
    for file in (ROOT / "integration").rglob("*.py"):
        top_level = [
            node for node in parse(file).body if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        found = set(imports(ast.Module(body=top_level, type_ignores=[])))
        guests = {name.split(".")[0] for name in found} & set().union(*ROOMS.values())
        assert guests <= ROOMS.get(file.parent.name, set()), file


def test_every_public_module_of_the_reference_says_what_is_public():
    for file in (ROOT / "reference").glob("*.py"):
        names = [node.targets[0].id for node in parse(file).body if isinstance(node, ast.Assign)]
        assert "__all__" in names, file
