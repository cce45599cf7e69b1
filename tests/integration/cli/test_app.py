"""The command line as a whole: usage errors, and that it answers without heavy imports."""

import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from typer.models import OptionInfo
from typer.testing import CliRunner

import int4_lora
from int4_lora.integration.cli.adapter import adapter
from int4_lora.integration.cli.app import app
from int4_lora.integration.cli.golden import golden

COMMANDS = {
    **{one.callback.__name__: one.callback for one in app.registered_commands},
    **{
        f"{name} {one.callback.__name__}": one.callback
        for name, group in (("adapter", adapter), ("golden", golden))
        for one in group.registered_commands
    },
}
VALUES = {  # of options whose values are checked by the command itself
    "--seed": "x",
    "--jobs": "0",
    "--shard": "3/2",
    "--max-shard-size": "0",
    "--device": "nonsense",
    "--tokens": "0",
    "--cases": "no/such/case",
    "--backends": "nobody",
}
ARGUMENTS = {
    "merge": ["missing", "target", "--adapter=missing"],
    "unpack": ["missing", "target"],
    "train": ["missing", "data", "--output=target"],
    "adapter quantize": ["missing", "target"],
    "adapter dequantize": ["missing", "target"],
    "golden write": ["folder"],
    "golden check": ["folder", "results"],
    "conform": ["int4_lora.reference"],
    **{name: ["missing"] for name in ("inspect", "verify", "annotate", "tune")},
}


def options_of(command):
    """Yield the options of a command that take a value, and a value that each refuses."""
    for name, hint in get_type_hints(COMMANDS[command], include_extras=True).items():
        annotation, *more = get_args(hint) or (None,)
        if not more or not isinstance(more[0], OptionInfo) or annotation is bool:
            continue
        option = (more[0].param_decls or [f"--{name.replace('_', '-')}"])[0]
        kinds = {annotation, *get_args(annotation)}
        kinds |= {kind for part in kinds for kind in get_args(part)}
        if any(isinstance(kind, type) and issubclass(kind, (int, float, Enum)) for kind in kinds):
            yield option, "nonsense"
        elif option in VALUES:
            yield option, VALUES[option]


def invoke(arguments):
    return CliRunner().invoke(app, arguments, terminal_width=200)


def assert_usage_error(arguments, message):
    result = invoke(arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert message in result.output, result.output
    assert "Traceback" not in result.output


def test_the_version():
    assert invoke(["--version"]).output == f"int4-lora {int4_lora.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_named(command):
    assert_usage_error([*command.split(), "--no-such-option"], "--no-such-option")


def test_an_unknown_command_is_named():
    assert_usage_error(["no-such-command"], "no-such-command")
    assert_usage_error(["golden", "no-such-command"], "no-such-command")


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [(command, *option) for command in COMMANDS for option in options_of(command)],
)
def test_a_wrong_value_names_its_option(command, option, value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = [*command.split(), *ARGUMENTS.get(command, []), option, value]
    assert_usage_error(given, option if option != "--cases" else value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["conform", "scoreboard"])
def test_a_device_without_values_is_refused(command):
    given = [command, *ARGUMENTS.get(command, []), "--device=meta"]
    assert_usage_error(given, "--device meta: ")


@pytest.mark.parametrize("command", ["merge", "demo"])
def test_a_wrong_adapter_names_its_option(command):
    given = [command, *ARGUMENTS.get(command, []), "--adapter=sql=much"]
    if command == "demo":
        given[-1] = "--adapter=sql"
    assert_usage_error(given, "--adapter must be")


HEAVY = ("torch", "numpy", "safetensors", "transformers", "compressed_tensors", "rich")
PROGRAM = f"""
import sys
from typer.testing import CliRunner
from int4_lora.integration.cli.app import app
for line in sys.stdin:
    CliRunner().invoke(app, line.split())
    loaded = [name for name in {HEAVY} if name in sys.modules]
    if loaded:
        sys.exit(f"int4-lora {{line.strip()}} imported {{loaded}}")
"""


def test_help_and_usage_errors_do_not_wait_for_torch_or_rich():
    lines = ["--help", "--version", "", "no-such-command", "--no-such-option", "golden --help"]
    for command in COMMANDS:
        lines += [f"{command} --help", f"{command} --no-such-option"]
        lines += [
            f"{command} {' '.join(ARGUMENTS.get(command, []))} {option} nonsense"
            for option, _ in options_of(command)
            if option not in VALUES
        ]
    lines += [
        "unpack a b --jobs 0",
        "unpack a b --shard 3/2",
        "merge a b --adapter c --max-shard-size 0",
        "merge a b --adapter c=much",
        "conform x --seed x",
        "demo --adapter sql",
        "tune missing --tokens 0",
        "tune missing --device nonsense",
        "train missing data --output target --device nonsense",
    ]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="\n".join(lines),
        text=True,
        capture_output=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert result.returncode == 0, result.stderr


def test_names_of_integration_are_imported_when_they_are_asked_for():
    names = (
        "import int4_lora.integration as i, sys; assert 'torch' not in sys.modules;"
        "print(set(i.__all__) <= set(dir(i)) and all(hasattr(i, name) for name in i.__all__))"
    )
    printed = subprocess.run([sys.executable, "-c", names], capture_output=True, check=True)
    assert printed.stdout == b"True\n"
    with pytest.raises(ImportError, match="no_such_name"):
        from int4_lora.integration import no_such_name  # noqa: F401
