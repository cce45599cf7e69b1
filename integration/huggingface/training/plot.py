"""Draw the losses of a training run; matplotlib is imported only here.

Source: ``matplotlib.figure.Figure``, used without pyplot, so that no display is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["check_can_plot", "plot_losses"]

BLUE, ORANGE = "#1f77b4", "#d95f02"


def check_can_plot() -> None:
    """Check that matplotlib is installed.

    Raises:
        ImportError: it is not; the message has the command that installs it.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: python -m pip install matplotlib")


def plot_losses(report: Mapping[str, Any], file: Path) -> None:
    """Draw the loss of every step and of every evaluation.

    Args:
        report: the run's report, with ``losses`` and ``evaluations``.
        file: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, color, marker in (
        ("losses", "training", BLUE, ""),
        ("evaluations", "evaluation", ORANGE, "o"),
    ):
        points = report[name]
        if points:
            steps, losses = ([point[key] for point in points] for key in ("step", "loss"))
            axes.plot(steps, losses, label=label, color=color, marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, format="png", dpi=120)
