"""What commands print with: a wide console, and one line for input that cannot be used.

Source: ``docs/commands/README.md``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["refusing_bad_input", "unusable", "wide_console"]

COLUMNS = 120


def wide_console() -> Console:
    """Return a console of the terminal's width, but at least 120 columns.

    A narrower one would drop columns of the tables; the terminal folds the lines instead.

    Example:
        >>> wide_console().width >= 120
        True
    """
    from rich.console import Console

    return Console(width=max(Console().width, COLUMNS))


def unusable(message: str) -> typer.Exit:
    """Print in one line on stderr why the input cannot be used; return the exit with code 2.

    Args:
        message: what is wrong, and where; line ends are folded.
    """
    typer.secho(f"int4-lora: {' '.join(message.split())}", fg=typer.colors.RED, err=True)
    return typer.Exit(2)


@contextlib.contextmanager
def refusing_bad_input(*more: type[Exception]) -> Iterator[None]:
    """End the command with exit code 2 and the message of an error over its input.

    Args:
        more: errors that count as such beside ImportError, OSError, TypeError and ValueError.
    """
    refused: tuple[type[Exception], ...] = (ImportError, OSError, TypeError, ValueError, *more)
    try:
        yield
    except refused as error:
        raise unusable(str(error)) from error
