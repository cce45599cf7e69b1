"""The file of a report: what it may replace, and the way it is written.

Source: ``docs/commands/conform.md``, "--report".
"""

from __future__ import annotations

import os
from pathlib import Path

from int4_lora.atomic_files import replace_files

__all__ = ["OPENING", "check_replaceable", "write_report"]

OPENING = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="int4-lora report">
"""
"""The first lines of every report, by which one is recognised."""


def check_replaceable(file: Path) -> None:
    """Check that a report can be written to a path: a new file, or in place of another report.

    Raises:
        ValueError: the path holds something that is no report, or its folder is missing.
        OSError: the file that is there cannot be read.
    """
    target = _target(file)
    if not target.parent.is_dir():
        raise ValueError(f"--report {file}: there is no folder {target.parent}")
    if not os.path.lexists(target):
        return
    if not target.is_file():
        raise ValueError(f"--report {file}: it must be a file or new")
    with target.open("rb") as opened:
        first = opened.read(len(OPENING.encode()))
    if first != OPENING.encode():
        raise ValueError(f"--report {file}: it is there and is no report; it is left as it is")


def write_report(file: Path, page: str) -> None:
    """Write a page, whole or not at all.

    Args:
        file: where to write it.
        page: begins with ``OPENING``.

    Raises:
        ValueError: the path holds something that is no report, or its folder is missing.
        OSError: the file cannot be written.
    """
    check_replaceable(file)
    replace_files({_target(file): page.encode()})


def _target(file: Path) -> Path:
    """Return the file that a path leads to; a loop of links is returned as it is."""
    return Path(os.path.realpath(file))
