"""Measure the layer beside every peer that imports."""

from benchmarks import layer
from benchmarks.report import report

__all__ = ["layers"]


def layers(run):
    """Yield the rows measured so far, as a record and as tables."""
    for row in layer.rows(run.options, run.host):
        run.cells.append(row)
        yield {"cells": run.cells}, report(run.cells)
        if run.late():
            return
