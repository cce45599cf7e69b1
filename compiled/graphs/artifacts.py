"""Store compiled graphs in a file, so that another process compiles nothing.

Source: ``torch.compiler.save_cache_artifacts`` and ``load_cache_artifacts``.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from int4_lora.atomic_files import replace_files

__all__ = ["load_artifacts", "save_artifacts"]


def save_artifacts(path: str | os.PathLike[str]) -> int:
    """Write the graphs that this process has compiled to a file, whole or not at all.

    Args:
        path: the file; an existing file is replaced.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: this process has compiled nothing.

    Example:
        >>> save_artifacts("layers.artifacts")  # doctest: +SKIP
        216532

    Source:
        ``torch.compiler.save_cache_artifacts``.
    """
    found = torch.compiler.save_cache_artifacts()
    if found is None:
        raise ValueError(f"{path}: nothing was compiled that could be saved")
    content, _ = found
    replace_files({Path(path): content})
    return len(content)


def load_artifacts(path: str | os.PathLike[str]) -> None:
    """Load the graphs that another process compiled; call it before the first layer.

    A file from another version of torch or another machine does no harm: its graphs do not match
    and are compiled again. The file is trusted like code.

    Args:
        path: a file written by ``save_artifacts``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold compiled graphs.

    Example:
        >>> load_artifacts("layers.artifacts")  # doctest: +SKIP

    Source:
        ``torch.compiler.load_cache_artifacts``.
    """
    content = Path(path).read_bytes()
    try:
        found = torch.compiler.load_cache_artifacts(content)
    except Exception as error:  # deserialising may raise anything
        raise ValueError(f"{path}: not a file of compiled graphs: {error}") from error
    if found is None:
        raise ValueError(f"{path}: not a file of compiled graphs")
