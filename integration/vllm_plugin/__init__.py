"""The opt-in vLLM backend: ``--quantization int4_lora``.

vLLM finds ``entry.install`` by its entry point. ``config.py`` is what the flag selects,
``scheme.py`` holds the INT4 weights, ``lora_layers.py`` puts the adapters on them, and
``served_layer.py`` computes, through ``int4_lora.compiled``. ``contract.py`` lists everything of
vLLM that is relied on.

Only ``config``, ``scheme``, ``lora_layers``, ``stock_trial`` and ``session`` import vLLM.

Source: ``docs/vllm.md``.
"""
