"""What the benchmarks' commands share: progress, the folder of made files, and result files."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.limits import missed

__all__ = ["RESULTS", "cache_folder", "finish", "say", "write"]

RESULTS = Path(__file__).parent / "results"


def cache_folder():
    """Return the default folder of the models that benchmarks make."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "int4-lora-benchmarks"


def say(line):
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def finish(name, record, tables, plot):
    """Print the tables; write ``results/NAME.json``, ``.md`` and, with matplotlib, ``.png``.

    Args:
        name: the name of the files; None writes none.
        record: the complete result, as JSON types; ``bars`` are its judgements, and ``not_judged``
            is why they do not count, or None.
        tables: the report in Markdown.
        plot: called with the file to plot to.

    Returns:
        The exit code: 1 if a bar is missed.
    """
    print(tables)
    if name:
        write(RESULTS, name, record, tables, plot)
    return 1 if missed(record["bars"]) and record["not_judged"] is None else 0


def write(folder, name, record, tables=None, plot=None):
    """Write ``folder/NAME.json``, the tables to ``.md`` and, with matplotlib, a plot to ``.png``.

    Args:
        folder: the folder.
        name: the name of the files.
        record: the complete result, as JSON types.
        tables: the report in Markdown, or None.
        plot: called with the file to plot to, or None.
    """
    text = json.dumps(record, indent=1)
    (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
    if tables is not None:
        (folder / f"{name}.md").write_text(f"{tables}\n", encoding="utf-8")
    if plot is not None and find_spec("matplotlib") is None:
        say("no plot: matplotlib is not installed")
    elif plot is not None:
        plot(folder / f"{name}.png")
