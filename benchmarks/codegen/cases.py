"""The layers whose code is read: the product's own call on fake tensors of an H200.

Source: the bars of ``benchmarks/codegen/__main__.py``.
"""

import hashlib
import re
from dataclasses import dataclass
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from int4_lora.compiled import PreparedLoRA, int4_lora_linear
from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.formulations import MAGIC_GEMV
from int4_lora.compiled.graphs import cache as graphs
from int4_lora.compiled.graphs import entry
from int4_lora.compiled.layouts.interleaved import InterleavedWeight


def on_gpu(shape, dtype):
    """Return a tensor of the device that is not there."""
    return torch.empty(shape, dtype=dtype, device="cuda")


@dataclass(frozen=True)
class Case:
    """One layer.

    Args:
        rows: out_features.
        columns: in_features.
        tokens: rows of x at the call that compiles.
        group: columns of a group; None for one group a row.
        symmetric: whether there are no zero-points.
        dtype: of x, the scales and the adapters.
        adapters: adapters to choose from; 0 for the base alone.
        rank: their rank.
        slices: outputs of each slice, or () for one slice of all.
        bias: whether there is one.
    """

    rows: int
    columns: int
    tokens: int
    group: int | None = 128
    symmetric: bool = True
    dtype: torch.dtype = torch.bfloat16
    adapters: int = 4
    rank: int = 16
    slices: tuple = ()
    bias: bool = False

    @property
    def groups(self):
        """Groups of a row."""
        return 1 if self.group is None else self.columns // self.group

    def __str__(self):
        """Return it in a few words."""
        group = "channel" if self.group is None else f"g{self.group}"
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        kind = "sym" if self.symmetric else "asym"
        extra = f" slices {'+'.join(map(str, self.slices))}" if self.slices else ""
        extra += " bias" if self.bias else ""
        extra += "" if self.adapters else " no adapters"
        return f"{self.rows} x {self.columns} M={self.tokens} {group} {kind} {dtype}{extra}"

    def operands(self, make):
        """Return the arguments of ``int4_lora_linear``; ``make(shape, dtype)`` makes tensors."""
        zeros = None
        if not self.symmetric:
            zeros = make((2 * -(-self.rows // 8), self.groups), torch.int16)
        weight = InterleavedWeight(
            words=make((self.rows, self.columns // 8), torch.int32),
            scale=make((self.rows, self.groups), self.dtype),
            shape=(self.rows, self.columns),
            zero_point=zeros,
            g_idx=None,
            order=None,
            group_size=self.group,
            exponent=make((self.rows,), torch.int32),
        )
        x = make((self.tokens, self.columns), self.dtype)
        bias = make((self.rows,), self.dtype) if self.bias else None
        if not self.adapters:
            return x, weight, None, None, bias
        parts, start = [], 0
        for rows in self.slices or (self.rows,):
            parts.append(
                PreparedSlice(
                    a=make((self.adapters, self.rank, self.columns), self.dtype),
                    bt=make((self.adapters, self.rank, rows), self.dtype),
                    scaling=make((self.adapters,), torch.float32),
                    start=start,
                )
            )
            start += rows
        ids = make((self.tokens,), torch.int64)
        return x, weight, PreparedLoRA(tuple(parts)), ids, bias

    def formulation(self):
        """Return the formulation whose code is read."""
        return MAGIC_GEMV

    def packed_bytes(self):
        """Return the bytes of words, scales and zero-points."""
        zeros = 0 if self.symmetric else self.rows * self.groups // 2
        scales = self.rows * self.groups * self.dtype.itemsize
        return self.rows * self.columns // 2 + scales + zeros

    def floor_bytes(self):
        """Return the bytes that must move: the packed weight, adapters, x and y."""
        size = self.dtype.itemsize
        active = min(self.adapters, self.tokens)
        lora = active * self.rank * (self.rows + self.columns) * size
        return self.packed_bytes() + lora + self.tokens * (self.rows + self.columns) * size


class _Generated(BaseException):
    """Carries the code out of the compilation, which must not go on to load it."""


@dataclass(frozen=True)
class Code:
    """What Inductor generated.

    Args:
        text: the wrapper, with the kernels' sources in it.
        inputs: what each argument of the wrapper is: "tokens", or the operand as ``operand`` names
            it.
    """

    text: str
    inputs: tuple

    @property
    def digest(self):
        """A hash of the kernels' sources."""
        return hashlib.sha256("".join(self.kernels.values()).encode()).hexdigest()[:12]

    @property
    def kernels(self):
        """The source of each kernel by its name."""
        pattern = r"(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str"
        return dict(re.findall(pattern, self.text, re.S))

    @property
    def launches(self):
        """What is launched, in order."""
        call = self.text[self.text.index("def call(") :]
        found = re.findall(r"(triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", call)
        return [name.removesuffix(".run") for name in found]

    @property
    def buffers(self):
        """The shape, as text, and dtype of each buffer that is allocated."""
        return re.findall(r"= empty_strided_cuda\(\((.*?)\), \(.*?\), torch\.(\w+)\)", self.text)


def operand(name, operands):
    """Return the operand that a graph's input is, by Dynamo's name such as "L['weight'].words"."""
    x, weight, lora, adapter_ids, bias = operands
    slices = lora.slices if lora is not None else ()
    scope = {"x": x, "weight": weight, "slices": slices, "adapter_ids": adapter_ids, "bias": bias}
    return eval(name, {"__builtins__": {}}, {"L": scope})


def generate(case):
    """Return the code of the product's call on a case."""
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering

    inputs, compile_graph = [], compile_fx.compile_fx

    def noting_inputs(graph, examples, **options):
        inputs.clear()  # it calls itself
        for node in graph.graph.find_nodes(op="placeholder"):
            size = isinstance(node.meta["example_value"], (int, torch.SymInt))
            inputs.append("tokens" if size else node.meta["grapharg"].source.name)
        return compile_graph(graph, examples, **options)

    def stop(self, *_, **__):
        code, _ = self.codegen()
        raise _Generated(getattr(code, "value", code))

    torch._dynamo.reset()
    graphs._graphs.clear()
    config = {"compile_threads": 1, "fx_graph_cache": False, "joint_graph_constant_folding": False}
    with (
        torch._inductor.config.patch(config),
        torch._functorch.config.patch(enable_autograd_cache=False),
        mock.patch.object(compile_fx, "compile_fx", noting_inputs),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        mock.patch.object(entry, "choose", return_value=case.formulation()),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):
        operands = case.operands(on_gpu)
        try:
            int4_lora_linear(*operands)
        except _Generated as found:
            return Code(found.args[0], tuple(inputs))
    raise RuntimeError(f"nothing was compiled for {case}")
