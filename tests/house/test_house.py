"""The rules of the house that a machine can check: imports, paths."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

GROUND = {"int4_lora.disk_cache", "int4_lora.atomic_files"}  # what package/ gives to all
ALLOWED = {
    "reference": {"torch", "int4_lora.reference"},
    "compiled": {"torch", "int4_lora.reference", "int4_lora.compiled", *GROUND},
}
# transformers and PEFT only in the packages that exist for them, vLLM in its own
ROOMS = {
    "demo": {"transformers", "peft"},
    "huggingface": {"transformers", "peft"},
    "training": {"transformers", "peft"},
    "vllm_plugin": {"vllm"},
}


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


def test_everything_imported_from_vllm_is_in_the_contract():
    """So that a vLLM that lacks it stops the start with its name, and not with an ImportError."""
    from int4_lora.integration.vllm_plugin.contract import ATTRIBUTES, SYMBOLS

    known = {(symbol.module, symbol.name.split(".")[0]) for symbol in SYMBOLS}
    known |= {(attribute.module, attribute.owner) for attribute in ATTRIBUTES}
    modules = {module for module, _ in known}
    for file in (ROOT / "integration" / "vllm_plugin").glob("*.py"):
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "vllm":
                for alias in node.names:
                    known_module = f"{node.module}.{alias.name}" in modules
                    assert known_module or (node.module, alias.name) in known, (file, alias.name)
            elif isinstance(node, ast.Import):
                imported = {alias.name for alias in node.names if alias.name.startswith("vllm")}
                assert imported <= modules, file
