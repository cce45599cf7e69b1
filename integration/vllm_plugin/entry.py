"""The entry point ``vllm.general_plugins``: registers ``--quantization int4_lora``.

vLLM calls it in every process: the command line's, the engine's, every worker's. It does nothing
else before the flag is used.

Source: https://docs.vllm.ai/en/latest/design/plugin_system/.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import logging

__all__ = ["install"]


def install() -> None:
    """Register the flag; where vLLM lacks what that needs, log one line and change nothing."""
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from int4_lora.integration.vllm_plugin.config import NAME, Int4LoRAConfig
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm.int4_lora").warning(
            "int4_lora: --quantization int4_lora is not there, this vLLM lacks something: %s", error
        )
        return
    from vllm.model_executor.layers import quantization

    registered = getattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
    if registered.get(NAME) is not Int4LoRAConfig:
        register_quantization_config(NAME)(Int4LoRAConfig)
