"""transformers' Trainer, as a run uses it: its arguments, and checks of what it computes.

Source: ``Trainer``, ``TrainingArguments`` and ``TrainerCallback`` of transformers 4.56 to 5.24.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from int4_lora.integration.huggingface.training.run_folder import RunFolder
from int4_lora.integration.huggingface.training.settings import Settings
from int4_lora.integration.huggingface.training.watch import Watch

__all__ = ["CheckedTrainer", "DivergedError", "Keeper", "arguments"]


class DivergedError(RuntimeError):
    """The loss or the gradients of a step are not finite.

    Args:
        what: what is not finite, with its value.
        step: the optimizer step, from 1.
        checkpoint: the last checkpoint before it, or None.
    """

    def __init__(self, what: str, step: int, checkpoint: Path | None) -> None:
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "none was saved yet"
        super().__init__(
            f"{what} in step {step}; {kept}. Try a smaller --learning-rate, or --dtype float32"
        )
        self.step, self.checkpoint = step, checkpoint


class CheckedTrainer(transformers.Trainer):
    """Trainer, which stops at a loss that is not finite, before the step that would use it.

    A checkpoint that cannot be written, on a full disk for example, is an OSError.

    Args:
        folder: the run's folder, with its last checkpoint.
        settings: Trainer's arguments.
    """

    folder: RunFolder

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Compute loss and gradients of a batch.

        Raises:
            DivergedError: the loss is not finite.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise DivergedError(
                f"the loss is not finite ({float(loss)})",
                self.state.global_step + 1,
                self.folder.last_checkpoint(),
            )
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it cannot be written; the message names the run's folder.
        """
        with self.folder.naming_failures():
            super()._save_checkpoint(*args, **kwargs)


class Keeper(transformers.TrainerCallback):
    """Keeps whole checkpoints, shows the losses, and stops at what is not finite.

    Args:
        folder: the run's folder.
        watch: shows the run.
    """

    def __init__(self, folder: RunFolder, watch: Watch) -> None:
        self.folder, self.watch = folder, watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Show the first step."""
        self.watch.begin(state.global_step, state.max_steps)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **given: Any
    ) -> None:
        """Check the gradients, which are whole now.

        Raises:
            DivergedError: a gradient is not finite.
        """
        gradients = [
            parameter.grad for parameter in model.parameters() if parameter.grad is not None
        ]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            raise DivergedError(
                f"the gradients are not finite (norm {norm})",
                state.global_step + 1,
                self.folder.last_checkpoint(),
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Have the last step evaluated, whatever the steps between evaluations."""
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        """Show the loss of a step."""
        if logs and "loss" in logs:
            self.watch.step(state.global_step, float(logs["loss"]))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **given: Any
    ) -> None:
        """Show the loss of an evaluation.

        Raises:
            DivergedError: it is not finite.
        """
        loss = float(metrics["eval_loss"])
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss of the evaluation is not finite ({loss})",
                state.global_step,
                self.folder.last_checkpoint(),
            )
        self.watch.evaluated(state.global_step, loss)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Keep the checkpoint that was written."""
        with self.folder.naming_failures():
            self.folder.keep(state.global_step)


def arguments(settings: Settings, folder: RunFolder, *, evaluates: bool) -> Any:
    """Return Trainer's arguments for a run.

    Args:
        settings: the run's settings, with a device.
        folder: the run's folder.
        evaluates: whether there is data to evaluate.

    Returns:
        ``TrainingArguments``. The rest is Trainer's default: AdamW without weight decay, gradients
        clipped at a norm of 1, a learning rate that falls linearly to zero.
    """
    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    kind = "activation" if "activation_checkpointing" in known else "gradient"  # from 5.23
    more: dict[str, Any] = {"eval_steps": settings.eval_every, "save_steps": settings.save_every}
    if settings.checkpointing:
        more |= {
            f"{kind}_checkpointing": True,
            f"{kind}_checkpointing_kwargs": {"use_reentrant": False},
        }
    made = transformers.TrainingArguments(
        output_dir=str(folder.writing),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        seed=settings.seed,
        data_seed=settings.seed,
        eval_strategy="steps" if evaluates else "no",
        eval_on_start=evaluates and folder.last_checkpoint() is None,
        prediction_loss_only=True,
        save_strategy="steps",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=settings.device == "cuda",
        use_cpu=settings.device == "cpu",
        disable_tqdm=True,
        report_to=[],
        **more,
    )
    if made.n_gpu > 1:
        made._n_gpu = 1  # Trainer would copy the model to every GPU for each step
    return made
