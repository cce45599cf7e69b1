"""The opt-in vLLM backend: ``--quantization int4_lora``.

vLLM finds ``entry.install`` by its entry point. ``config.py`` is what the flag selects,
``scheme.py`` loads packed weights, ``converted_scheme.py`` those of AWQ and GPTQ,
``lora_layers.py`` adds the adapters; ``experts_method.py`` and ``experts_lora.py`` do the same for
experts. The plug-in's state of a layer is a ``ServedLayer`` or ``ServedExperts``, its state of an
engine a ``ServedEngine``. ``contract.py`` lists everything of vLLM that the plug-in relies on.

Only ``config``, ``scheme``, ``converted_scheme``, ``lora_layers``, ``experts_method``,
``experts_lora``, ``stock_trial`` and ``vocabulary`` import vLLM.

Source: ``docs/vllm-maintainers.md``.
"""
