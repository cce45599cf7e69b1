"""What a training run is told, apart from its files.

Source: ``TrainingArguments`` of transformers and ``LoraConfig`` of PEFT, which take most of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Settings"]

DTYPES = ("bfloat16", "float16", "float32")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Settings:
    """The settings of a run; None means the default that the run chooses.

    Args:
        rank: the rank of every adapter; 16 by default.
        alpha: the scaling is alpha / rank; by default twice the rank.
        targets: last parts of the names of the modules to train, or ``("all-linear",)``; by default
            those that the checkpoint suggests.
        length: the most tokens of a row; by default 512, or as many as the model takes.
        steps: the optimizer steps.
        batch: the rows in a batch.
        accumulate: the batches whose gradients a step sums.
        learning_rate: the learning rate of the first step; it falls linearly to zero.
        seed: the seed of the adapter's start, of the order of rows and of the evaluation split.
        eval_split: the share of the data that is evaluated and not trained on.
        eval_every: the steps between evaluations; by default a tenth of the steps.
        save_every: the steps between checkpoints; by default a tenth of the steps.
        dtype: the dtype of activations and dense weights; by default the checkpoint's, and bfloat16
            where that is float16.
        device: cpu or cuda; by default cuda where there is a GPU.
        checkpointing: whether activations are computed again in the backward pass, to save memory.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range; the message names it.

    Example:
        >>> Settings(steps=30).save_every
        3
        >>> Settings(steps=0)
        Traceback (most recent call last):
        ...
        ValueError: steps must be at least 1, got 0
    """

    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    length: int | None = None
    steps: int = 100
    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 2e-4
    seed: int = 0
    eval_split: float = 0.0
    eval_every: int | None = None
    save_every: int | None = None
    dtype: str | None = None
    device: str | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the values, and choose the defaults that follow from other settings."""
        for name in ("eval_every", "save_every"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, max(1, self.steps // 10))
        for name in ("rank", "steps", "batch", "accumulate", "eval_every", "save_every"):
            _check_count(name, getattr(self, name), 1, optional=name == "rank")
        _check_count("length", self.length, 2, optional=True)
        _check_count("seed", self.seed, 0, optional=False)
        if self.seed >= 2**32:  # numpy's seed, which Trainer sets, too
            raise ValueError(f"seed must be below 2^32, got {self.seed}")
        _check_positive("learning_rate", self.learning_rate)
        if self.alpha is not None:
            _check_positive("alpha", self.alpha)
        if not 0 <= self.eval_split < 1:
            raise ValueError(f"eval_split must be in [0, 1), got {self.eval_split:g}")
        if self.targets is not None and not (self.targets and all(self.targets)):
            raise ValueError(f"targets must be names of modules, got {list(self.targets)}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be {', '.join(DTYPES)}, got {self.dtype}")
        if self.device not in (None, *DEVICES):
            raise ValueError(
                f"device must be cpu or cuda, got {self.device}; of several GPUs, "
                "CUDA_VISIBLE_DEVICES selects the GPU"
            )


def _check_count(name: str, value: object, least: int, *, optional: bool) -> None:
    """Check that a setting is a whole number of at least ``least``."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_positive(name: str, value: float) -> None:
    """Check that a setting is a finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value:g}")
