"""Train an adapter on an INT4 model: a thin face over transformers' Trainer.

Source: ``docs/commands/train.md``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from int4_lora.integration.adapter.adapter import Adapter
from int4_lora.integration.adapter.base_weights import BaseWeights
from int4_lora.integration.adapter.files import TENSOR_FILE
from int4_lora.integration.adapter.fitting import fit_adapter
from int4_lora.integration.adapter.int4_form import is_int4
from int4_lora.integration.adapter.read import read_adapter
from int4_lora.integration.adapter.shapes import check_shape
from int4_lora.integration.checkpoint.json_files import read_json_object
from int4_lora.integration.checkpoint.open import Checkpoint, open_checkpoint
from int4_lora.integration.huggingface.load import load_packed
from int4_lora.integration.huggingface.training.base import (
    base_digest,
    default_dtype,
    default_targets,
    model_without_weights,
    read_tokenizer,
    size_of,
)
from int4_lora.integration.huggingface.training.data import Data, collate, read_data
from int4_lora.integration.huggingface.training.plot import check_can_plot, plot_losses
from int4_lora.integration.huggingface.training.run_folder import RunFolder
from int4_lora.integration.huggingface.training.settings import Settings
from int4_lora.integration.huggingface.training.trainer import CheckedTrainer, Keeper, arguments
from int4_lora.integration.huggingface.training.watch import Watch

__all__ = ["REPORT", "Trained", "train"]

REPORT, PLOT = "training.json", "loss.png"
RANK, LENGTH = 16, 512
PACKAGES = ("int4-lora", "torch", "transformers", "peft", "accelerate", "compressed-tensors")


@dataclass(frozen=True)
class Trained:
    """A trained adapter.

    Args:
        output: the adapter's folder.
        report: the content of its ``training.json``.
    """

    output: Path
    report: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class _Plan:
    """A run that was checked, and that has written nothing yet."""

    model: str
    checkpoint: Checkpoint
    base: str
    settings: Settings
    data: Data
    start: Path | None
    description: Mapping[str, Any]


def train(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    start_from: str | os.PathLike[str] | None = None,
    resume: bool = False,
    force: bool = False,
    plot: bool = False,
    watch: Watch | None = None,
) -> Trained:
    """Train a LoRA adapter on an INT4 checkpoint, whose weights stay packed.

    The run's checkpoints are in ``OUTPUT.partial`` until the adapter is whole. A run that is
    resumed from them ends with the same adapter, bit for bit, as a run that was not interrupted, on
    the same machine and CPU.

    Args:
        model: the checkpoint's folder, or its name on the hub.
        data: a file of text or JSON lines, as ``read_data`` takes it.
        output: the folder to write: the adapter, as PEFT saves it, and ``training.json``.
        settings: the settings; None for the defaults.
        start_from: an adapter whose weights, rank, alpha and targets the run begins with.
        resume: whether to continue an unfinished run of the same settings and data.
        force: whether to replace an adapter, or an unfinished run, that is there.
        plot: whether to draw the losses in ``loss.png``.
        watch: hears of the steps.

    Returns:
        The folder, and the report.

    Raises:
        DivergedError: a loss or gradient is not finite.
        ImportError: accelerate is not installed, or matplotlib for a plot.
        OSError: a file is missing or cannot be written, or the output is there.
        ValueError: data, settings, adapter or model do not fit each other; nothing is written.

    Example:
        >>> settings = Settings(rank=8, steps=200)
        >>> train("my-model-W4A16", "notes.txt", "my-adapter", settings)  # doctest: +SKIP

    Source:
        ``docs/commands/train.md``.
    """
    watch = watch or Watch()
    if find_spec("accelerate") is None:
        raise ImportError("training needs accelerate: python -m pip install 'int4-lora[train]'")
    if plot:
        check_can_plot()
    folder, start = RunFolder(Path(output)), None if start_from is None else Path(start_from)
    checkpoint = open_checkpoint(model)
    checkpoint.check_compressed_tensors("training")
    read = [checkpoint.path, Path(data), *([] if start is None else [start])]
    folder.check_place(read, resume=resume, force=force)
    plan = _plan(os.fspath(model), checkpoint, Path(data), settings or Settings(), start)
    if resume:
        folder.check_same(plan.description)
    for note in plan.data.notes:
        watch.say(note)
    adapted, notes = _adapted(plan)
    for note in notes:
        watch.say(note)
    with folder.opened(plan.description, resume=resume):
        trainer = _trainer(plan, adapted, folder, watch)
        last = folder.last_checkpoint()
        if last is not None:
            watch.say(f"continuing after {last.name}")
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        report = _report(plan, trainer.state.log_history, notes)
        made = folder.partial / "adapter"
        with folder.naming_failures():
            adapted.save_pretrained(str(made), save_embedding_layers=False)
            text = json.dumps(report, indent=2, allow_nan=False) + "\n"
            (made / REPORT).write_text(text, encoding="utf-8")
            if plot:
                plot_losses(report, made / PLOT)
            folder.place(made)
    return Trained(folder.output, report)


def _plan(
    model: str, checkpoint: Checkpoint, data: Path, settings: Settings, start: Path | None
) -> _Plan:
    """Check all that a run reads, and fill in the defaults that follow from it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("the command trains in one process; call Trainer itself for several")
    base = base_digest(checkpoint)
    settings = _filled(settings, checkpoint, None if start is None else _adapter(start, checkpoint))
    if start is not None:
        _check_base(start, base)
    vocabulary = size_of(checkpoint, "vocab_size")
    assert settings.length is not None
    rows = read_data(
        data,
        read_tokenizer(checkpoint.path),
        length=settings.length,
        vocabulary=2**31 if vocabulary is None else vocabulary,
        eval_split=settings.eval_split,
        seed=settings.seed,
    )
    description = {
        "base (digest of its tensors)": base,
        "data (sha256)": rows.sha256,
        **json.loads(json.dumps(dataclasses.asdict(settings))),
        "start_from (sha256)": None if start is None else _sha256(start / TENSOR_FILE),
        "rows (sha256 of all tokens)": rows.rows_sha256,
    }
    return _Plan(model, checkpoint, base, settings, rows, start, description)


def _filled(settings: Settings, checkpoint: Checkpoint, start: Adapter | None) -> Settings:
    """Return settings with the defaults that depend on the model, and checked against it."""
    limit = size_of(checkpoint, "max_position_embeddings")
    if settings.length is None:
        length = LENGTH if limit is None else min(LENGTH, limit)
    else:
        length = settings.length
    if limit is not None and length > limit:
        raise ValueError(
            f"length must be at most {limit}, the max_position_embeddings of {checkpoint.path}, "
            f"got {length}"
        )
    if start is None:
        rank = settings.rank or RANK
        targets = settings.targets or default_targets(checkpoint)
        _check_adapter(rank, targets, checkpoint)
        alpha = 2.0 * rank if settings.alpha is None else settings.alpha
    else:
        for name in ("rank", "alpha", "targets"):
            if getattr(settings, name) is not None:
                raise ValueError(f"{name} is that of the adapter to start from: leave it out")
        rank, alpha = start.config["r"], float(start.config["lora_alpha"])
        named = start.config["target_modules"]
        targets = (named,) if isinstance(named, str) else tuple(sorted(named))
    return dataclasses.replace(
        settings,
        rank=rank,
        alpha=alpha,
        targets=targets,
        length=length,
        dtype=settings.dtype or default_dtype(checkpoint),
        device=_device(settings.device),
    )


def _device(wanted: str | None) -> str:
    """Return the device to train on.

    Raises:
        ValueError: CUDA is asked for, and absent.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ValueError("device cuda is asked for, and torch sees no CUDA GPU")
    return wanted or ("cuda" if available else "cpu")


def _adapter(folder: Path, checkpoint: Checkpoint) -> Adapter:
    """Read the adapter to start from, and check that it fits the base."""
    if is_int4(folder):
        raise ValueError(
            f"{folder} is an adapter in INT4, which PEFT does not train: write it in floats with "
            "int4-lora adapter dequantize"
        )
    adapter = read_adapter(folder)
    fitted, base = fit_adapter(adapter, checkpoint), BaseWeights(checkpoint)
    for name in fitted.modules:
        check_shape(fitted, name, *base.matrix_shape(name, f"{folder}: {name}"))
    return adapter


def _check_base(start: Path, digest: str) -> None:
    """Check the base that the report of an adapter names, if it has a report."""
    file = start / REPORT
    if not file.is_file():
        return
    base = read_json_object(file).get("base")
    trained = base.get("digest") if isinstance(base, dict) else None
    if trained is not None and trained != digest:
        raise ValueError(
            f"{file}: the adapter is of another base: its base has the digest {trained}, and this "
            f"model {digest}"
        )


def _adapted(plan: _Plan) -> tuple[Any, list[str]]:
    """Load the model with its adapter; return the warnings of loading, each once."""
    settings = plan.settings
    assert settings.dtype is not None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        model = load_packed(
            plan.model if not Path(plan.model).is_dir() else str(plan.checkpoint.path),
            dtype=getattr(torch, settings.dtype),
        )
        model.config.use_cache = False
        transformers.set_seed(settings.seed)
        if plan.start is None:
            adapted: Any = peft.get_peft_model(model, _config(settings))
        else:
            adapted = peft.PeftModel.from_pretrained(model, plan.start, is_trainable=True)
    config = adapted.peft_config[adapted.active_adapter]
    config.base_model_name_or_path = plan.model
    return adapted, list(dict.fromkeys(str(warning.message) for warning in warned))


def _check_adapter(rank: int, targets: Sequence[str], checkpoint: Checkpoint) -> None:
    """Check the rank and the targets of a new adapter, before the model's weights are loaded.

    PEFT is content if a single target names a module. The checkpoint's names are those of experts,
    too, which transformers 5 fuses.
    """
    model = model_without_weights(checkpoint)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    most = max((min(linear.in_features, linear.out_features) for linear in linears), default=rank)
    if rank > most:
        raise ValueError(
            f"rank must be at most {most}, the highest that a linear layer of the model can have, "
            f"got {rank}"
        )
    if targets == ("all-linear",):
        return
    names = [*(name for name, _ in model.named_modules()), *checkpoint.modules()]
    absent = [
        target
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]
    if absent:
        alone = "; all-linear stands alone" if "all-linear" in absent else ""
        raise ValueError(f"targets: the model has no module named {', '.join(absent)}{alone}")


def _config(settings: Settings) -> peft.LoraConfig:
    """Return PEFT's config of a new adapter."""
    targets = list(settings.targets or ())
    chosen: dict[str, Any] = {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": targets[0] if targets == ["all-linear"] else targets,
    }
    return peft.LoraConfig(task_type="CAUSAL_LM", **chosen)


def _trainer(plan: _Plan, adapted: Any, folder: RunFolder, watch: Watch) -> CheckedTrainer:
    """Return the Trainer of a run."""
    train: Any = plan.data.train  # a list is what Trainer's samplers need of a data set
    evaluate: Any = plan.data.evaluate or None
    trainer = CheckedTrainer(
        model=adapted,
        args=arguments(plan.settings, folder, evaluates=evaluate is not None),
        train_dataset=train,
        eval_dataset=evaluate,
        data_collator=collate,
        callbacks=[Keeper(folder, watch)],
    )
    trainer.folder = folder
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _report(plan: _Plan, history: list[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    """Return what a run did, as JSON types."""
    data, keys = plan.data, ("step", "loss", "learning_rate", "grad_norm")
    losses = [
        {key: entry[key] for key in keys if key in entry} for entry in history if "loss" in entry
    ]
    return {
        "base": {"name": plan.model, "digest": plan.base},
        "data": {
            "file": data.file.name,
            "sha256": data.sha256,
            "documents": data.documents,
            "rows": len(data.train),
            "tokens": sum(len(row.tokens) for row in data.train),
            "evaluation_rows": len(data.evaluate),
        },
        "settings": json.loads(json.dumps(dataclasses.asdict(plan.settings))),
        "start_from": None if plan.start is None else str(plan.start),
        "notes": [*data.notes, *notes],
        "losses": losses,
        "evaluations": [
            {"step": entry["step"], "loss": entry["eval_loss"]}
            for entry in history
            if "eval_loss" in entry
        ],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    }


def _sha256(file: Path) -> str | None:
    """Return the digest of a file's bytes; None if there is no such file."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
