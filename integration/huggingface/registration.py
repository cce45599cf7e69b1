"""Make the libraries around a model treat its packed layers as they need.

The libraries are torch's DistributedDataParallel and, where they are installed, transformers and
PEFT. Their modules here import ``Int4Linear``, which registers them itself when it is unpickled, so
they are imported when they are called.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings

__all__ = ["register"]

PACKAGE = "int4_lora.integration.huggingface"


def register() -> None:
    """Register with DDP, transformers and PEFT; a second call changes nothing."""
    importlib.import_module(f"{PACKAGE}.data_parallel").register()
    if importlib.util.find_spec("transformers") is not None:
        importlib.import_module(f"{PACKAGE}.resized_head").register()
    if importlib.util.find_spec("peft") is None:
        return
    try:
        registration = importlib.import_module(f"{PACKAGE}.peft_registration")
    except ImportError as error:
        warnings.warn(f"PEFT is installed, but cannot be used here: {error}", stacklevel=3)
        return
    registration.register()
