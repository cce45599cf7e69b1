"""Let vLLM load an adapter in INT4: its folder is dequantised into a temporary one.

vLLM refuses the keys of such an adapter. Its LoRA slots hold A and B in floats, so that they are
dequantised anyway.

Source: ``LoRAModel.from_local_checkpoint`` in ``vllm/lora/lora_model.py``.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from int4_lora.integration.adapter.int4_form import is_int4
from int4_lora.integration.adapter.quantize import dequantize_adapter

__all__ = ["loadable_folder"]


@contextlib.contextmanager
def loadable_folder(path: str) -> Iterator[str]:
    """Yield a folder that vLLM loads: ``path``, or a temporary one with its floats.

    Args:
        path: the path of a request's adapter: a folder, or a name on the Hugging Face hub, which is
            yielded unchanged.

    Raises:
        TypeError: a tensor of an adapter in INT4 has the wrong dtype.
        ValueError: an adapter in INT4 cannot be read; the message names the file.
    """
    if not is_int4(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="int4-lora-adapter-") as beside:
        floats = Path(beside) / "floats"
        dequantize_adapter(path, floats)
        yield str(floats)
