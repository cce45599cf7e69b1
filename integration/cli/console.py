"""A console wide enough for the tables: a narrow one would drop their columns.

Source: ``docs/commands/README.md``.
"""

from __future__ import annotations

from rich.console import Console

__all__ = ["wide_console"]

COLUMNS = 120


def wide_console() -> Console:
    """Return a console of the terminal's width, or of 120 columns, which the terminal then folds.

    Example:
        >>> wide_console().width >= 120
        True
    """
    return Console(width=max(Console().width, COLUMNS))
