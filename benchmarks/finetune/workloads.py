"""Define what is measured: training steps, forwards and ``generate``.

Source: ``benchmarks/results/README.md``.
"""

from dataclasses import dataclass

STEP, CHECKPOINTED = "step", "step, checkpointing"
GENERATE, GENERATE_ADAPTED = "generate", "generate, adapter"
STEPS, GENERATES = (STEP, CHECKPOINTED), (GENERATE, GENERATE_ADAPTED)
FORWARD, FORWARD_1, TRAINING = "forward", "forward, 1 token", "training"
TIMES = {FORWARD: 3, FORWARD_1: 3, TRAINING: 2}  # how often a fresh process runs it


@dataclass(frozen=True)
class Sizes:
    """The sizes of a batch.

    Args:
        rows: the sequences of a training step.
        length: the tokens of each.
        prompt: the tokens of the prompt of ``generate``.
        new: the tokens that it generates.
    """

    rows: int
    length: int
    prompt: int
    new: int

    @property
    def batch(self):
        """The size of a training step, in words."""
        return f"{self.rows} x {self.length} tokens"

    def of_speed(self, workload):
        """Return the command of a step or of ``generate`` to a contender, and its arguments."""
        if workload in STEPS:
            checkpointing = workload == CHECKPOINTED
            return "step", {**self._training, "checkpointing": checkpointing}
        adapter = workload == GENERATE_ADAPTED
        return "generate", {"prompt": self.prompt, "new": self.new, "adapter": adapter}

    def of_start(self, workload):
        """Return the command of a fresh process's workload, and its arguments."""
        if workload == TRAINING:
            return self.of_speed(CHECKPOINTED)
        return "forward", {"rows": 1, "length": 1} if workload == FORWARD_1 else self._training

    @property
    def _training(self):
        return {"rows": self.rows, "length": self.length}
