"""Make and hold one kind of weights in a process, and decode a row with them.

INT4 weights are random words, so that no dense weight is ever in memory beside them. A token takes
a product with every linear layer, one after the other, and with lm_head; attention and norms are
left out. On CUDA, the layers are captured in one CUDA graph, as in ``benchmarks/modes.py``, and
lm_head in another.
"""

import functools
import time

import torch
from torch.nn.functional import linear

from benchmarks import modes
from benchmarks.child import forget_the_peak, memory_bytes, serve
from benchmarks.contenders import Contender
from benchmarks.seed_table.shapes import DENSE, LORA, Model
from int4_lora.compiled import int4_linear, int4_lora_linear, prepare, prepare_lora
from int4_lora.reference import LoRAStack, PackedWeight


class Holder:
    """The commands and their state."""

    def __init__(self):
        self._runs = {}

    @torch.inference_mode()
    def make(self, kind, sizes, layers, dtype, device, threads):
        """Make the weights and compile the layers.

        Args:
            kind: one of ``KINDS``.
            sizes: fields of ``Model``.
            layers: the number of decoder layers to hold.
            dtype: torch's name of the dtype of x, scales and dense weights.
            device: "cpu" or "cuda".
            threads: the number of torch's threads.

        Returns:
            The bytes before the weights were made, the bytes held per layer, and the peak.
        """
        torch.set_num_threads(threads)
        before = memory_bytes()["now"]
        model, dtype = Model(**sizes), getattr(torch, dtype)
        generator = torch.Generator(device).manual_seed(0)
        make = functools.partial(_linear, kind, model, dtype, generator)
        parts = [make(shape) for _ in range(layers) for shape in model.linears]
        head, self._embedding = (
            _dense((model.vocabulary, model.hidden), dtype, generator) for _ in range(2)
        )
        inputs = {
            size: torch.randn(1, size, generator=generator, device=device, dtype=dtype)
            for size in (model.hidden, model.intermediate)
        }
        ids = torch.zeros(1, dtype=torch.int64, device=device)
        product = functools.partial(_product, inputs, ids)
        self._runs["layers"] = _ready([(*part, product) for part in parts], device)
        self._runs["head"] = _ready([(head, None, model.hidden, product)], device)
        made = {"layer_bytes": held_bytes(parts) / layers, "making": self.memory()["peak"]}
        return {"bytes_before": before, **made, "peak_starts_again": _forget_the_peak()}

    @torch.inference_mode()
    def run(self, what):
        """Return the seconds that one row takes through the "layers", or the "head" (lm_head)."""
        run, times = self._runs[what]
        _synchronise()
        started = time.perf_counter()
        run()
        _synchronise()
        return (time.perf_counter() - started) / times

    def memory(self):
        """Return the GPU's peak memory since the weights were made, or the process's on a CPU."""
        if torch.cuda.is_available():
            return {"peak": torch.cuda.max_memory_allocated(), "of": "GPU, torch's allocations"}
        return {"peak": memory_bytes()["peak"], "of": "the process"}


def _linear(kind, model, dtype, generator, shape):
    """Return a layer's weight, its adapters or None, and its in_features."""
    rows, columns = shape
    if kind == DENSE:
        return _dense(shape, dtype, generator), None, columns
    weight = prepare(packed_weight(rows, columns, model.group_size, dtype, generator))
    if kind != LORA:
        return weight, None, columns
    a = _dense((1, model.rank, columns), dtype, generator)
    b = _dense((1, rows, model.rank), dtype, generator)
    scaling = torch.ones(1, dtype=torch.float32, device=a.device)
    return weight, prepare_lora(LoRAStack(a, b, scaling)), columns


def packed_weight(rows, columns, group_size, dtype, generator):
    """Return a weight of random words whose rows have a norm of about 1."""
    device = generator.device
    words = torch.randint(
        -(2**31),
        2**31 - 1,
        (rows, columns // 8),
        generator=generator,
        device=device,
        dtype=torch.int32,
    )
    scale = torch.rand(rows, columns // group_size, generator=generator, device=device) + 0.5
    scale = (scale / (4.6 * columns**0.5)).to(dtype)  # 4.6: the RMS of integers from -8 to 7
    return PackedWeight(words, scale, (rows, columns), group_size=group_size)


def _dense(shape, dtype, generator):
    weight = torch.empty(shape, dtype=dtype, device=generator.device)
    return weight.uniform_(-1, 1, generator=generator).mul_((3 / shape[-1]) ** 0.5)


def _product(inputs, ids, weight, lora, columns):
    x = inputs[columns]
    if isinstance(weight, torch.Tensor):
        return linear(x, weight)
    return int4_linear(x, weight) if lora is None else int4_lora_linear(x, weight, lora, ids)


def _ready(parts, device):
    """Return a function that runs the parts in order, and how often one call runs them."""

    def call(part):
        *operands, product = part
        return product(*operands)

    if device == "cuda":
        ready = modes.cuda_graph(Contender("", "ours", call, parts))
        return functools.partial(ready.run, 0), ready.layers / len(parts)

    def run():
        for part in parts:
            y = call(part)
        return y

    run()  # compiles
    return run, 1


def held_bytes(parts):
    """Return the bytes of weights and adapters in memory; shared storage counts once."""
    operands = [value for *pair, _ in parts for value in pair]
    storages = [tensor.untyped_storage() for tensor in _tensors(operands)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
        return
    parts = value if isinstance(value, (tuple, list)) else getattr(value, "__dict__", {}).values()
    for part in parts:
        yield from _tensors(part)


def _forget_the_peak():
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    return forget_the_peak()


def _synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    holder = Holder()
    serve({"make": holder.make, "run": holder.run, "memory": holder.memory})
