"""INT4 models in transformers and PEFT: they stay packed for inference and for fine-tuning.

Source: transformers and PEFT; ``docs/transformers.md``.
"""

from int4_lora.integration.huggingface.int4_experts import Int4Experts
from int4_lora.integration.huggingface.int4_linear import Int4Linear
from int4_lora.integration.huggingface.keep import keep_packed
from int4_lora.integration.huggingface.load import load_packed

__all__ = ["Int4Experts", "Int4Linear", "keep_packed", "load_packed"]
