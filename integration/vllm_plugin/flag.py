"""The flag ``--quantization int4_lora``, as every process of vLLM knows it.

vLLM asks each quantisation that is registered whether it takes a checkpoint, also where nobody set
the flag. So this class imports nothing but vLLM's base class. Where the flag is set, it first
checks what the backend relies on, and then hands over to ``Int4LoRAConfig``.

Source: vLLM's ``ModelConfig._verify_quantization`` and ``get_quant_config``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

__all__ = ["NAME", "Int4LoRAFlag"]

logger = init_logger("vllm.int4_lora")
NAME = "int4_lora"
METHODS = ("compressed-tensors", "awq", "gptq")
TAKEN = "compressed-tensors, AWQ and GPTQ"
WITHOUT = f"leave out --quantization {NAME}"


class Int4LoRAFlag(QuantizationConfig):
    """The class that vLLM has under the name ``int4_lora``; it has no instances."""

    def __new__(cls) -> Int4LoRAFlag:
        """Refuse: vLLM makes an instance for a model that is not quantised."""
        raise ValueError(
            f"int4_lora takes {TAKEN} checkpoints, and this model has no quantization_config: "
            f"{WITHOUT}"
        )

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Answer where the operator set the flag; else log that it exists, for such models."""
        method = hf_quant_cfg.get("quant_method")
        if user_quant == NAME:
            if method not in METHODS:
                raise ValueError(
                    f"int4_lora takes {TAKEN} checkpoints, and this one is {method!r}: {WITHOUT}"
                )
            return NAME
        compatible = hf_quant_cfg.get("lora_compatible") or getattr(
            hf_config, "lora_compatible", False
        )
        if method in METHODS and compatible:
            logger.info_once(
                "int4_lora: the model says lora_compatible; --quantization int4_lora serves its "
                "INT4 linears and adapters in one kernel"
            )
        return None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Return the ``Int4LoRAConfig`` of a checkpoint.

        Raises:
            ValueError: vLLM lacks something that the backend relies on, or is too old; or something
                of the checkpoint is refused.
        """
        from int4_lora.integration.vllm_plugin.contract import check_installed

        check_installed()  # first: what is missing may be what the next line imports
        from int4_lora.integration.vllm_plugin.config import Int4LoRAConfig

        return Int4LoRAConfig.from_config(config)

    @classmethod
    def get_name(cls) -> str:
        """Return the name of the flag."""
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[Any]:
        """Return no dtypes: vLLM asks the configuration itself."""
        return []

    @classmethod
    def get_min_capability(cls) -> int:
        """Return no limit: vLLM asks the configuration itself."""
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no files: the configuration is part of config.json."""
        return []
