"""Print tables on a wide console, and errors about unusable input in one line.

Source: ``docs/commands/README.md``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["counted", "refusing_bad_input", "unusable", "wide_console"]

COLUMNS = 120


def counted(count: int, noun: str) -> str:
    """Return a number with its noun in the singular or in the plural.

    Example:
        >>> counted(1, "other file"), counted(0, "other file")
        ('1 other file', '0 other files')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def wide_console() -> Console:
    """Return a console as wide as the terminal, but at least 120 columns.

    A narrower console would drop columns of the tables; the terminal wraps long lines instead.

    Example:
        >>> wide_console().width >= 120
        True
    """
    from rich.console import Console

    return Console(width=max(Console().width, COLUMNS))


def unusable(message: str) -> typer.Exit:
    """Print one line on stderr about unusable input; return the exit with code 2.

    Args:
        message: what is wrong, and where; it is printed without its line breaks.
    """
    typer.secho(f"int4-lora: {' '.join(message.split())}", fg=typer.colors.RED, err=True)
    return typer.Exit(2)


@contextlib.contextmanager
def refusing_bad_input(*more: type[Exception]) -> Iterator[None]:
    """End the command with exit code 2 and the error's message if the body rejects its input.

    Args:
        more: the exceptions to catch in addition to ImportError, OSError, TypeError and ValueError.
    """
    refused: tuple[type[Exception], ...] = (ImportError, OSError, TypeError, ValueError, *more)
    try:
        yield
    except refused as error:
        raise unusable(str(error)) from error
