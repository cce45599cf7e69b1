"""A copy of the reference with a fault, as a backend.

The suite itself must stay right, so the copy is imported under another name, and its operands are
converted.
"""

import dataclasses
import importlib
import sys
from pathlib import Path

import int4_lora.reference
from int4_lora.reference import LoRAStack

SOURCE = Path(int4_lora.reference.__file__).parent


def planted_reference(folder, changed):
    """Return the reference as a backend, with the text of some modules replaced.

    Args:
        folder: an empty folder for the copy.
        changed: {name of a module: {right: wrong}}.
    """
    name = f"planted_{folder.name}".replace("-", "_").replace("[", "_").replace("]", "_")
    package = folder / name
    package.mkdir()
    for file in SOURCE.glob("*.py"):
        text = file.read_text()
        for right, wrong in changed.get(file.stem, {}).items():
            assert right in text, f"{file.stem} no longer holds {right!r}: mend this mutant"
            text = text.replace(right, wrong)
        text = text.replace("int4_lora.reference", name)
        (package / file.name).write_text(text)
    sys.path.insert(0, str(folder))
    try:
        return PlantedBackend(importlib.import_module(name))
    finally:
        sys.path.remove(str(folder))


class PlantedBackend:
    """A planted copy of the reference, called with operands of the real one."""

    manifest = int4_lora.reference.manifest

    def __init__(self, planted):
        self.planted = planted
        self.pack, self.unpack = planted.pack, planted.unpack

    def dequantize(self, weight, dtype=None):
        return self.planted.dequantize(self._weight(weight), dtype)

    def from_gptq(self, *tensors, **options):
        return self.planted.dequantize(self.planted.from_gptq(*tensors, **options))

    def from_awq(self, *tensors):
        return self.planted.dequantize(self.planted.from_awq(*tensors))

    def int4_linear(self, x, weight, bias=None):
        return self.planted.int4_linear(x, self._weight(weight), bias)

    def int4_lora_linear(self, x, weight, lora=None, adapter_ids=None, bias=None):
        lora = self._lora(lora)
        return self.planted.int4_lora_linear(x, self._weight(weight), lora, adapter_ids, bias)

    def int4_moe(self, x, experts, topk_ids, topk_weights, lora=None, adapter_ids=None, **options):
        layers = ([self._weight(w) for w in layer] for layer in (experts.gate_up, experts.down))
        routing = (topk_ids, topk_weights)
        planted, lora = self.planted.ExpertsWeight(*layers), self._experts_lora(lora)
        return self.planted.int4_moe(x, planted, *routing, lora, adapter_ids, **options)

    def _experts_lora(self, lora):
        if lora is None:
            return None
        layers = (
            None if layer is None else [self._lora(entry) for entry in layer]
            for layer in (lora.gate_up, lora.down)
        )
        return self.planted.ExpertsLoRA(*layers)

    def shrink(self, x, lora, adapter_ids):
        return self.planted.shrink(x, self._lora(lora), adapter_ids)

    def expand(self, h, lora, adapter_ids):
        return self.planted.expand(h, self._lora(lora), adapter_ids)

    def _weight(self, weight):
        fields = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
        fields.pop("column_order", None)
        return getattr(self.planted, type(weight).__name__)(**fields)

    def _lora(self, lora):
        def copy(stack):
            return self.planted.LoRAStack(stack.a, stack.b, stack.scaling)

        if lora is None or isinstance(lora, LoRAStack):
            return None if lora is None else copy(lora)
        return [self.planted.LoRASlice(copy(part.stack), part.start) for part in lora]
