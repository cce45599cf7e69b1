"""The entry point ``vllm.general_plugins``: makes ``--quantization int4_lora`` known.

vLLM calls it in every process: the command line's, the engine's, every worker's. Nothing else is
done before the flag is used.

Source: https://docs.vllm.ai/en/latest/design/plugin_system/.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import logging

__all__ = ["install"]


def install() -> None:
    """Make the flag known; where vLLM has moved too far for that, log one line and leave it be."""
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
