"""vLLM's Punica operators: shrink into float32, then expand into the base in place.

The scaling is folded into B, as vLLM does when it loads an adapter. The kernels' grid is vLLM's
default, which has one adapter more than are loaded.

Source: ``PunicaWrapperGPU.add_lora_linear`` of ``vllm/lora/punica_wrapper/punica_gpu.py`` and
``vllm/lora/ops/triton_ops``, read in vLLM 0.17.1, 0.20.2, 0.27.1 and 0.32.0.
"""

import functools
import importlib

import torch

from benchmarks.peers.peer import Adapters, not_importable

PUNICA = "vllm.lora.ops.triton_ops"


def _refuses(layer):
    if layer.device.type != "cuda":
        return "Punica is for CUDA"
    if layer.dtype not in (torch.float16, torch.bfloat16):
        return f"x in {layer.dtype}: Punica takes 16 bits"
    return not_importable(PUNICA)


def _make(layer):
    punica = importlib.import_module(PUNICA)
    stack = layer.stack
    b = (stack.b * stack.scaling.to(layer.dtype)[:, None, None]).contiguous()
    meta = punica.LoRAKernelMeta.make(stack.adapters, layer.tokens, layer.device)
    meta.prepare_tensors(layer.ids)
    tokens = meta.meta_args(layer.tokens, False)
    return functools.partial(_add, punica, layer.x, stack.a.contiguous(), b, tokens)


def _add(punica, x, a, b, tokens, base):
    h = torch.empty(1, x.shape[0], a.shape[1], dtype=torch.float32, device=x.device)
    punica.lora_shrink(x, [a], h, *tokens, 1.0)
    punica.lora_expand(h, [b], base, *tokens, offset_start=0, add_inputs=True)
    return base


ADAPTERS = Adapters("Punica", _refuses, _make)
