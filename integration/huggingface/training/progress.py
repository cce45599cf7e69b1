"""Show a training run: a bar with the loss and the time left, or lines where there is no terminal.

Source: ``rich.progress``.
"""

from __future__ import annotations

import warnings
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from int4_lora.integration.huggingface.training.watch import Watch

__all__ = ["Bar", "quiet"]

LINES = 10  # of a run, where there is no terminal


class Bar(Watch):
    """A progress bar, to be used as a context; notes and evaluations are lines above it.

    Args:
        console: where to show it; on stderr by default.
        silent: whether to show notes only.
    """

    def __init__(self, console: Console | None = None, *, silent: bool = False) -> None:
        self.console = console or Console(stderr=True, soft_wrap=True)
        self.silent, self.steps = silent, 0
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=silent or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=None, visible=False, loss="")
        self.evaluation = ""

    def __enter__(self) -> Bar:
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        self.bar.stop()

    def say(self, note: str) -> None:
        """Print a sentence."""
        self.bar.console.print(note, markup=False, highlight=False)

    def begin(self, step: int, steps: int) -> None:
        """Begin the bar."""
        self.steps = steps
        self.bar.update(self.task, total=steps, completed=step, visible=True)

    def step(self, step: int, loss: float) -> None:
        """Move the bar; without a terminal, print every tenth of the steps."""
        self.bar.update(self.task, completed=step, loss=f"loss {loss:.4f}{self.evaluation}")
        if self._prints(step):
            self.say(f"step {step} of {self.steps}: loss {loss:.4f}")

    def evaluated(self, step: int, loss: float) -> None:
        """Print the loss of an evaluation, and keep it beside the bar."""
        self.evaluation = f", evaluated {loss:.4f}"
        if not self.silent:
            self.say(f"step {step} of {self.steps}: evaluated loss {loss:.4f}")

    def _prints(self, step: int) -> bool:
        """Return whether a step gets a line."""
        if self.silent or self.console.is_terminal:
            return False
        return step == self.steps or step % max(1, self.steps // LINES) == 0


def quiet() -> None:
    """Silence what transformers and PEFT print themselves: a run tells what matters."""
    warnings.filterwarnings("ignore", module=r"(transformers|peft|accelerate)\b")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
