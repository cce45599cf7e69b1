"""transformers with ``dequantize=True``: write a checkpoint and load it.

Source: ``transformers/quantizers/quantizer_compressed_tensors.py``.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from int4_lora.integration.conformance.peers.compressed_tensors import (
    stored_weight,
    weights_arguments,
)
from int4_lora.reference import PackedWeight
from int4_lora.reference.conformance import Manifest

__all__ = ["TransformersDequantize"]

MODULE = "model.layers.0.mlp.gate_proj"


class TransformersDequantize:
    """``AutoModelForCausalLM.from_pretrained`` of a Llama whose one INT4 module is the weight."""

    manifest = Manifest()

    def __init__(self) -> None:
        self._transformers = importlib.import_module("transformers")
        importlib.import_module("compressed_tensors")
        logging = importlib.import_module("transformers.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def dequantize(self, weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight of the loaded model."""
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), weight)
            config = self._transformers.CompressedTensorsConfig(dequantize=True)
            with warnings.catch_warnings():  # it warns that the flag overrides the config
                warnings.simplefilter("ignore")
                model = self._transformers.AutoModelForCausalLM.from_pretrained(
                    folder, quantization_config=config, dtype=weight.scale.dtype
                )
            dense: Tensor = model.get_submodule(MODULE).weight.detach()
        return dense.clone() if dtype is None else dense.to(dtype)

    def _write(self, folder: Path, weight: PackedWeight) -> None:
        config = self._transformers.LlamaConfig(
            hidden_size=weight.in_features,
            intermediate_size=weight.out_features,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=8,
            tie_word_embeddings=True,
        )
        model = self._transformers.LlamaForCausalLM(config).to(weight.scale.dtype)
        tensors = {
            name: value for name, value in model.state_dict().items() if "lm_head" not in name
        }
        del tensors[f"{MODULE}.weight"]
        stored = {f"{MODULE}.{name}": value for name, value in stored_weight(weight).items()}
        tensors = {name: value.contiguous() for name, value in {**tensors, **stored}.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        group = {
            "targets": [f"re:.*{MODULE.rpartition('.')[2]}$"],
            "weights": weights_arguments(weight),
        }
        saved = json.loads(config.to_json_string())
        saved["architectures"] = ["LlamaForCausalLM"]
        saved["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
        (folder / "config.json").write_text(json.dumps(saved), encoding="utf-8")
