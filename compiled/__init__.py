"""The reference's definition through ``torch.compile``; empty in this release.

``torch.compile(int4_lora.reference.int4_lora_linear, fullgraph=True)`` works meanwhile.
"""

__all__: list[str] = []
