"""Tell an adapter, or a model that was saved with one, from a checkpoint.

Source: ``LoraLayer`` in ``peft/tuners/lora/layer.py``, which renames a layer's tensors to
``base_layer``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["check_is_no_adapter", "check_no_adapter_within"]

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"


def check_is_no_adapter(folder: Path) -> None:
    """Check that a folder without ``config.json`` is not that of an adapter.

    Args:
        folder: the folder of a checkpoint.

    Raises:
        FileNotFoundError: it holds an adapter and no model.
    """
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder / CONFIG} is not there: the folder holds an adapter, which --adapter of "
            "inspect and merge takes, and --start-from of train"
        )


def check_no_adapter_within(folder: Path, names: Iterable[str]) -> None:
    """Check that no layer has the name that PEFT gives to a layer beside an adapter.

    Args:
        folder: the folder of the checkpoint, for the message.
        names: the names of its tensors.

    Raises:
        ValueError: a tensor belongs to a ``base_layer``.
    """
    wrapped = next((name for name in names if ".base_layer." in name), None)
    if wrapped is not None:
        raise ValueError(
            f"{folder}: {wrapped} is of a model that was saved with PEFT's layers around its own: "
            "save the model after unload(), and the adapter in a folder of its own"
        )
