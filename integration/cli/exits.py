"""How a command says that its input cannot be used.

Source: ``docs/commands/README.md``.
"""

from __future__ import annotations

import typer

__all__ = ["unusable"]


def unusable(message: str) -> typer.Exit:
    """Print why the input cannot be used, in one line on stderr; return the exit with code 2.

    Args:
        message: what is wrong, and where; line ends are folded.
    """
    typer.secho(f"int4-lora: {' '.join(message.split())}", fg=typer.colors.RED, err=True)
    return typer.Exit(2)
