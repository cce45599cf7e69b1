"""Train LoRA adapters on INT4 models with transformers' Trainer.

``settings`` holds what a run is told, ``data`` makes rows of tokens from text, ``base`` opens the
model, and ``run`` trains and writes the adapter. ``run_folder`` keeps a run's checkpoints until the
adapter is whole. ``progress`` shows a run, ``plot`` draws its losses.

Source: ``docs/commands/train.md``.
"""

from int4_lora.integration.huggingface.training.run import Trained, train
from int4_lora.integration.huggingface.training.settings import Settings
from int4_lora.integration.huggingface.training.trainer import DivergedError

__all__ = ["DivergedError", "Settings", "Trained", "train"]
