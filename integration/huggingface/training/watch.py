"""What a training run tells while it runs; here it tells nobody.

Source: ``int4_lora.integration.huggingface.training.progress``, which shows it.
"""

from __future__ import annotations

__all__ = ["Watch"]


class Watch:
    """Hears of the steps of a run, and ignores them; a subclass shows them."""

    def say(self, note: str) -> None:
        """Tell a sentence about the model, the data or the run.

        Args:
            note: the sentence.
        """

    def begin(self, step: int, steps: int) -> None:
        """Tell that the training begins.

        Args:
            step: the steps that are done already, by a run that is resumed.
            steps: all steps.
        """

    def step(self, step: int, loss: float) -> None:
        """Tell that a step is done.

        Args:
            step: the step, from 1.
            loss: its mean loss per token, in nats.
        """

    def evaluated(self, step: int, loss: float) -> None:
        """Tell the loss on the evaluation split.

        Args:
            step: the step after which it was computed.
            loss: the mean loss per token, in nats.
        """
