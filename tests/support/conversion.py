"""Conversions run as a user runs them, and what they wrote."""

import json

from safetensors.torch import load_file
from typer.testing import CliRunner

from int4_lora.integration.cli.app import app

SMALL = ("--max-shard-size", "0.0005")  # several files even of a tiny model


def run(*arguments):
    """Run ``int4-lora`` in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def convert(*arguments):
    """Run a conversion that must succeed; return the outcome that it prints."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(command, source, target, *options):
    """Run a conversion that must be refused before it writes anything; return its message."""
    result = run(command, source, target, *options)
    assert result.exit_code == 2, result.output
    assert not target.exists()
    assert not target.with_name(f"{target.name}.partial").exists()
    return result.stderr


def tensors_of(folder):
    """Return every tensor of a checkpoint by name."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def bytes_of(folder):
    """Return the contents of every file below a folder, by relative path."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
