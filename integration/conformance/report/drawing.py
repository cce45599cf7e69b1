"""Heat maps as images inside the page; matplotlib is imported only here.

Source: ``matplotlib.figure.Figure``, used without pyplot, so that no display is needed.
"""

from __future__ import annotations

import base64
import io
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from int4_lora.integration.conformance.report.error_map import WORD, Axis, ErrorMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "check_can_draw", "draw"]

COLOURS = ("#eef3f8", "#a9c6e0", "#fde725", "#fca636", "#e2431e", "#7a0403", "#4b0c8a")
"""Of the classes of ``error_map``, in their order."""

WIDTH, DPI = 8.6, 90  # inches, pixels per inch
LEFT, RIGHT, TOP, BOTTOM = 1.15, 0.12, 0.1, 0.5  # inches around the map
CELL, LOW, HIGH = 0.15, 0.9, 2.6  # inches: a row, and the least and the most of all rows
CELLS = 512  # of each axis; of more, the worst of several is drawn
WORDS_SHOWN = 80  # more lines would hide the map
PALETTE = 32  # colours of the image
INK, PAPER = "#1c2733", "#ffffff"


def check_can_draw() -> None:
    """Check that matplotlib and jinja2 are installed.

    Raises:
        ImportError: one is not; the message has the command that installs it.
    """
    for package in ("matplotlib", "jinja2"):
        if find_spec(package) is None:
            raise ImportError(f"--report needs {package}: python -m pip install {package}")


def draw(drawn: ErrorMap) -> str:
    """Return the heat map of a result's errors, as the address of an image: a ``data:`` URI."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    rows, columns = drawn.rows, drawn.columns
    strip = 0.16 if columns.groups is not None else 0.0
    inner = min(max(CELL * rows.length, LOW if rows.length > 1 else 0.3), HIGH)
    height = inner + TOP + BOTTOM + strip
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    width = 1 - (LEFT + RIGHT) / WIDTH
    place = (LEFT / WIDTH, BOTTOM / height, width, inner / height)
    axes = figure.add_axes(place)
    shown, steps = _pooled(drawn.classes)
    extent = (0.0, steps[1] * shown.shape[1], float(steps[0] * shown.shape[0]), 0.0)
    colours = ListedColormap(COLOURS)
    axes.imshow(
        shown.numpy(),
        cmap=colours,
        vmin=-0.5,
        vmax=len(COLOURS) - 0.5,
        extent=extent,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_xlim(0, columns.length)
    axes.set_ylim(rows.length, 0)
    _label(axes, rows, columns)
    if columns.groups is not None:
        above = figure.add_axes((place[0], place[1] + place[3], width, strip / height))
        _draw_groups(above, columns)
    return _as_uri(figure)


def _pooled(classes: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return the worst class of each block, such that there are few blocks, and their size."""
    steps = (-(-classes.shape[0] // CELLS), -(-classes.shape[1] // CELLS))
    if steps == (1, 1):
        return classes, steps
    pooled = torch.nn.functional.max_pool2d(
        classes.double()[None, None], steps, stride=steps, ceil_mode=True
    )
    return pooled[0, 0].long(), steps


def _label(axes: Axes, rows: Axis, columns: Axis) -> None:
    axes.tick_params(labelsize=8, length=2, colors=INK)
    axes.set_xlabel(_title(columns), fontsize=9, color=INK)
    if rows.names:
        axes.set_yticks([token + 0.5 for token in range(rows.length)], labels=rows.names)
        axes.tick_params(axis="y", labelsize=7 if rows.length > 12 else 8, length=0)
    else:
        axes.set_ylabel(_title(rows), fontsize=9, color=INK)
    for axis, line in ((columns, axes.axvline), (rows, axes.axhline)):  # seen on every colour
        if axis.words and axis.length <= WORD * WORDS_SHOWN:
            for position in range(WORD, axis.length, WORD):
                line(position, color=PAPER, linewidth=0.9, alpha=0.4)
                line(position, color=INK, linewidth=0.35, alpha=0.6)
        for position in axis.lines:
            line(position, color=PAPER, linewidth=3.2)
            line(position, color=INK, linewidth=1.4)
    for spine in axes.spines.values():
        spine.set_color(INK)


def _title(axis: Axis) -> str:
    """Return an axis' name with what its lines mean."""
    lines = [f"thick lines: {axis.lines_mean}"] if axis.lines else []
    if axis.words and axis.length <= WORD * WORDS_SHOWN:
        lines.append("thin lines: words of 8")
    if axis.groups is not None:
        lines.append("strip: the group of each column")
    return axis.name + (f"   ({', '.join(lines)})" if lines else "")


def _draw_groups(axes: Axes, columns: Axis) -> None:
    if columns.groups is None:
        return
    axes.imshow(
        (columns.groups % 20).numpy()[None],
        cmap="tab20",
        vmin=0,
        vmax=19,
        extent=(0.0, float(columns.length), 1.0, 0.0),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_axis_off()


def _as_uri(figure: Figure) -> str:
    """Return a drawn figure as a PNG of few colours, which takes few bytes."""
    from PIL import Image

    png, small = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png")
    image = Image.open(png).convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE)
    image.save(small, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"
