"""Load layers in vLLM, and print how many were kept packed, what stays in memory, and the peak.

``python -m support.layer_loads FOLDER`` in an environment of ``ENVIRONMENT``: the allocator then
returns all that is freed at once, so that what is resident is in use.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from support.engines import CONFIG, one_rank
from support.memory import peak_bytes

INPUTS, OUTPUTS, LAYERS = 4096, 8192, 6
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident_bytes():
    """Return the resident set of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])


def forget_the_peak():
    """Reset the peak to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def layer_of(config, number):
    """Return a layer of vLLM with words and scales, as a checkpoint's loader leaves it."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    layer = ReplicatedLinear(
        INPUTS,
        OUTPUTS,
        bias=False,
        params_dtype=torch.bfloat16,
        quant_config=config,
        prefix=f"layers.{number}",
    )
    generator = torch.Generator().manual_seed(number)
    words = torch.randint(-(2**31), 2**31, (OUTPUTS, INPUTS // 8), generator=generator)
    layer.weight_packed.data.copy_(words)
    layer.weight_scale.data.fill_(0.01)
    return layer


def loaded(folder):
    """Return the number of layers kept packed, and the bytes that stay and the peak of four."""
    from int4_lora.integration.vllm_plugin.config import Int4LoRAConfig
    from int4_lora.integration.vllm_plugin.options import Options
    from int4_lora.integration.vllm_plugin.served_engine import ServedEngine

    with one_rank(folder):
        config = Int4LoRAConfig.from_config(CONFIG)
        config._engine = ServedEngine(Options(backend="compiled"), max_tokens=64)
        layers = [layer_of(config, number) for number in range(LAYERS)]
        first, second, *others = layers
        for layer in (first, second):  # compiles
            layer.quant_method.process_weights_after_loading(layer)
        gc.collect()
        forget_the_peak()
        before = resident_bytes()
        for layer in others:
            layer.quant_method.process_weights_after_loading(layer)
        peak = peak_bytes() - before
        kept = sum(layer.int4_lora.weight is not None for layer in layers)
        return {"kept": kept, "stays": resident_bytes() - before, "peak": peak}


if __name__ == "__main__":
    print(json.dumps(loaded(Path(sys.argv[1]))))
