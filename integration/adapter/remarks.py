"""Say what a reader of an adapter should know before using it: it adds nothing, or not all.

Source: ``LoraLayer.update_layer`` in ``peft/tuners/lora/layer.py``, which starts B at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from int4_lora.integration.adapter.adapter import AdapterModule
from int4_lora.integration.adapter.files import CONFIG_FILE

__all__ = ["remarks"]


def remarks(config: Mapping[str, Any], modules: Mapping[str, AdapterModule]) -> tuple[str, ...]:
    """Return one sentence for each of these: all pairs add zero, the base is an adapter itself.

    Args:
        config: the content of adapter_config.json.
        modules: the adapter's pairs, by the names of their layers.

    Example:
        >>> import torch
        >>> untrained = AdapterModule(torch.ones(2, 8), torch.zeros(4, 2), scaling=2.0)
        >>> remarks({"r": 2, "lora_alpha": 4}, {"q_proj": untrained})
        ('its pairs add nothing: one matrix of each is zero, as before training',)
    """
    found = []
    if modules and all(module.scaling == 0 for module in modules.values()):
        found.append(f"its pairs add nothing: lora_alpha is {config.get('lora_alpha')}")
    elif modules and not any(module.a.any() and module.b.any() for module in modules.values()):
        found.append("its pairs add nothing: one matrix of each is zero, as before training")
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and _is_adapter(base):
        found.append(f"it was trained on another adapter, which it needs beside it: {base}")
    return tuple(found)


def _is_adapter(path: str) -> bool:
    try:
        return (Path(path) / CONFIG_FILE).is_file()
    except (OSError, ValueError):  # no path at all
        return False
