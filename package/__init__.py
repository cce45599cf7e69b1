"""INT4 base models with LoRA adapters: a reference, its compiled form, and a vLLM backend.

- ``int4_lora.reference``: the ground truth, in eager PyTorch.
- ``int4_lora.compiled``: the same definition through ``torch.compile``.
- ``int4_lora.integration``: checkpoints, adapters, the vLLM backend and the command line.
"""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("int4-lora")
