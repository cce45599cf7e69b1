"""The entry point ``vllm.general_plugins``: registers ``--quantization int4_lora``.

vLLM calls it in every process: the command line's, the engine's, every worker's. It registers a
class that imports nothing of the backend before the flag is used.

Source: https://docs.vllm.ai/en/latest/design/plugin_system/.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import logging

__all__ = ["install"]


def install() -> None:
    """Register the flag; if that fails, log one line and change nothing.

    vLLM passes an exception on, which would stop engines that do not use the flag.
    """
    try:
        _register()
    except Exception as error:  # whatever another vLLM, or a broken installation, raises
        logging.getLogger("vllm.int4_lora").warning(
            "int4_lora: --quantization int4_lora is not there: %s: %s", type(error).__name__, error
        )


def _register() -> None:
    """Register the flag; a second call changes nothing."""
    from vllm.model_executor.layers import quantization

    from int4_lora.integration.vllm_plugin.flag import NAME, Int4LoRAFlag

    registered = getattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
    if registered.get(NAME) is not Int4LoRAFlag:
        quantization.register_quantization_config(NAME)(Int4LoRAFlag)
