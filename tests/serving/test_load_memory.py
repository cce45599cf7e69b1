"""The peak memory of a load: the weights, and beside them one layer that is being laid out."""

import ctypes
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from support.engines import CONFIG, one_rank
from support.memory import peak_bytes

INPUTS, OUTPUTS, LAYERS = 4096, 8192, 6
PACKED = INPUTS * OUTPUTS // 2
DENSE = 2 * INPUTS * OUTPUTS  # in 16 bits, for scale


def resident_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])


def return_free_memory():
    """Have the allocator return what earlier tests freed, so that what is resident is in use."""
    ctypes.CDLL(None).malloc_trim(0)


def forget_the_peak():
    """Reset the peak to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def loaded(folder):
    """Load layers; return how many were kept packed, what stays of others, and the peak."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from int4_lora.integration.vllm_plugin.config import Int4LoRAConfig
    from int4_lora.integration.vllm_plugin.options import Options
    from int4_lora.integration.vllm_plugin.served_engine import ServedEngine

    with one_rank(folder):
        config = Int4LoRAConfig.from_config(CONFIG)
        config._engine = ServedEngine(Options(backend="compiled"), max_tokens=64)
        layers = []
        for number in range(LAYERS):
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
            layers.append(layer)
        return_free_memory()
        first, second, *others = layers
        for layer in (first, second):  # compiles, and gives the allocator room for temporaries
            layer.quant_method.process_weights_after_loading(layer)
        forget_the_peak()
        before = resident_bytes()
        for layer in others:
            layer.quant_method.process_weights_after_loading(layer)
        grown = peak_bytes() - before
        return_free_memory()
        kept = sum(layer.int4_lora.weight is not None for layer in layers)
        return kept, resident_bytes() - before, grown


def test_one_layer_is_in_memory_twice_at_most(tmp_path):
    """In a process of its own: other tests leave free memory between what they keep."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        kept, stays, grown = pool.submit(loaded, tmp_path).result(timeout=300)
    assert kept == LAYERS
    assert stays <= PACKED / 2  # one copy of each
    assert grown <= 1.4 * PACKED  # a layer's new layout, and the codes of some rows
    assert grown < DENSE / 2
