"""Define the arguments and options that several commands share.

This module imports torch only in functions, so that ``--help`` and usage errors appear at once.

Source: ``docs/commands/README.md``.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    import torch

__all__ = [
    "AsJson",
    "Cases",
    "CheckpointPath",
    "Device",
    "Dtype",
    "GoldenFolder",
    "Quick",
    "RenameOption",
    "Seed",
    "Unlisted",
    "as_rename",
    "as_torch",
    "check_device",
    "choice_of",
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Cases = Annotated[
    str | None,
    typer.Option(help="Names of cases, separated by commas; *, ? and [...] are wildcards."),
]
CheckpointPath = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A checkpoint of compressed-tensors, GPTQ or AWQ: a folder, or OWNER/NAME on the "
        "Hugging Face hub.",
    ),
]
Device = Annotated[str, typer.Option(help="The device to compute on: cpu, cuda or cuda:N.")]
GoldenFolder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of golden files.")]
Quick = Annotated[bool, typer.Option("--quick", help="Run a third of the cases.")]
RenameOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rename",
        metavar="OLD=NEW",
        help="A module of an adapter whose name starts with OLD starts with NEW instead; may be "
        "repeated.",
    ),
]
Seed = Annotated[int, typer.Option(help="The seed of the random inputs.")]


class _Choice(str, Enum):
    TAKE = "take"
    LEAVE = "leave"


Unlisted = Annotated[
    _Choice | None,
    typer.Option(
        help="What to do with tensors that are in CHECKPOINT's files, but not in its index: take "
        "them as part of the model, or leave them; by default such a checkpoint is refused."
    ),
]


class Dtype(str, Enum):
    """The float dtypes that weights and activations may have."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def as_torch(dtype: Dtype | None) -> torch.dtype | None:
    """Return torch's dtype of the same name; None for None."""
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def as_rename(options: list[str] | None) -> list[tuple[str, str]]:
    """Return the pairs of ``--rename OLD=NEW``.

    Raises:
        ValueError: an option is not of this form.

    Example:
        >>> as_rename(["model.=model.language_model."])
        [('model.', 'model.language_model.')]
    """
    pairs = []
    for option in options or []:
        old, equals, new = option.partition("=")
        if not equals or "=" in new or old == new:
            raise ValueError(f"--rename must be OLD=NEW, two different prefixes, got {option!r}")
        pairs.append((old, new))
    return pairs


def choice_of(unlisted: _Choice | None) -> Literal["take", "leave"] | None:
    """Return the value of ``--unlisted`` as ``open_checkpoint`` takes it."""
    return None if unlisted is None else unlisted.value


def check_device(device: str) -> None:
    """Check that tensors can be made on a device and read back.

    Raises:
        ValueError: tensors cannot be made on the device or read back.
    """
    import torch

    try:
        torch.zeros(1, device=device).item()  # tensors on "meta" have no values
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
