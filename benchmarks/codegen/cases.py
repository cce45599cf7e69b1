"""Generate the code of layers by calling ``int4_lora_linear`` on fake tensors of an H200.

Source: ``docs/compiled.md`` for the defaults on a GPU.
"""

import hashlib
import re
from dataclasses import dataclass
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from int4_lora.compiled import PreparedLoRA, int4_lora_linear
from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.graphs import cache, entry
from int4_lora.compiled.layouts.interleaved import InterleavedWeight
from int4_lora.compiled.selection.choice import default


def on_gpu(shape, dtype):
    """Return a tensor on the fake GPU."""
    return torch.empty(shape, dtype=dtype, device="cuda")


@dataclass(frozen=True)
class Case:
    """One layer.

    Args:
        rows: out_features.
        columns: in_features.
        tokens: rows of x.
        group: columns of a group, or None for one group per row.
        symmetric: whether the weight has no zero-points.
        dtype: the dtype of x, the scales and the adapters.
        adapters: the number of adapters in the stack, or 0 for the base alone.
        rank: the rank of the adapters.
        slices: the number of outputs of each slice, or () for one slice of all outputs.
        bias: whether the layer has a bias.
        reordered: whether a ``g_idx`` reorders the columns.
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
    reordered: bool = False

    @property
    def groups(self):
        """Groups per row."""
        return 1 if self.group is None else self.columns // self.group

    def __str__(self):
        """Return the name of the case in tables."""
        group = "channel" if self.group is None else f"g{self.group}"
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        kind = "sym" if self.symmetric else "asym"
        extra = f" slices {'+'.join(map(str, self.slices))}" if self.slices else ""
        extra += " bias" if self.bias else ""
        extra += " g_idx" if self.reordered else ""
        extra += f" rank {self.rank}" if self.rank != Case.rank else ""
        extra += "" if self.adapters else " no adapters"
        shape = f"{self.rows} x {self.columns} M={self.tokens}"
        return f"{shape} {group} {kind} {names[self.dtype]}{extra}"

    def operands(self, make):
        """Return the arguments of ``int4_lora_linear``; ``make(shape, dtype)`` returns a tensor."""
        zeros = None
        if not self.symmetric:
            zeros = make((2 * -(-self.rows // 8), self.groups), torch.int16)
        weight = InterleavedWeight(
            words=make((self.rows, self.columns // 8), torch.int32),
            scale=make((self.rows, self.groups), self.dtype),
            shape=(self.rows, self.columns),
            zero_point=zeros,
            g_idx=make((self.columns,), torch.int32) if self.reordered else None,
            order=make((self.columns,), torch.int32) if self.reordered else None,
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

    def packed_bytes(self):
        """Return the bytes of the words, scales and zero-points."""
        zeros = 0 if self.symmetric else self.rows * self.groups // 2
        scales = self.rows * self.groups * self.dtype.itemsize
        return self.rows * self.columns // 2 + scales + zeros

    def floor_bytes(self):
        """Return the least bytes to move: packed weight, active adapters, x and y."""
        size = self.dtype.itemsize
        active = min(self.adapters, self.tokens)
        lora = active * self.rank * (self.rows + self.columns) * size
        return self.packed_bytes() + lora + self.tokens * (self.rows + self.columns) * size


class _Generated(BaseException):
    """Stops the compilation and carries its code out, because loading the code needs a GPU."""


@dataclass(frozen=True)
class Code:
    """The code that Inductor generated.

    Args:
        text: the wrapper's source, which contains the sources of its kernels.
        formulation: the name of the compiled formulation.
        places: the index of each argument of the wrapper in (number of tokens, x, adapter ids,
            bias, *tensors of the adapters, *tensors of the weight).
    """

    text: str
    formulation: str
    places: tuple[int, ...]

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
        """The names of the launched kernels and operators, in order."""
        call = self.text[self.text.index("def call(") :]
        names = re.findall(r"(triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", call)
        return [name.removesuffix(".run") for name in names]

    @property
    def buffers(self):
        """The shape, as text, and the dtype of each allocated buffer."""
        return re.findall(r"= empty_strided_cuda\(\((.*?)\), \(.*?\), torch\.(\w+)\)", self.text)


def generate(case, choose=default):
    """Return the code of ``int4_lora_linear`` on a case.

    Measurements in this machine's cache are not read. The graph's inputs are matched with the
    operands by identity, as the product matches them when its operands are real tensors.

    Args:
        case: the layer.
        choose: ``choose(weight, dtype of x, tokens, slices)`` returns the formulation.
    """
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering

    formulations, matched, places = [], [], []
    compile_inductor, compile_graph = compile_fx.compile_fx, entry.compile_graph

    def noting_formulation(weight, dtype, tokens, slices):
        formulations.append(choose(weight, dtype, tokens, slices))
        return formulations[-1]

    def noting_operands(key, bucket, function, backend, operands, tensors):
        matched.append((tensors, bucket))
        return compile_graph(key, bucket, function, backend, operands, tensors)

    def noting_inputs(graph, examples, **options):
        places.append(cache._places(graph, examples, *matched[0]))
        return compile_inductor(graph, examples, **options)

    def stop(self, *_, **__):
        code, _ = self.codegen()
        raise _Generated(getattr(code, "value", code))

    torch._dynamo.reset()
    cache._graphs.clear()
    config = {"compile_threads": 1, "fx_graph_cache": False, "joint_graph_constant_folding": False}
    with (
        torch._inductor.config.patch(config),
        torch._functorch.config.patch(enable_autograd_cache=False),
        mock.patch.object(compile_fx, "compile_fx", noting_inputs),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        mock.patch.object(entry, "choose", noting_formulation),
        mock.patch.object(entry, "compile_graph", noting_operands),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):
        operands = case.operands(on_gpu)
        try:
            int4_lora_linear(*operands)
        except _Generated as generated:
            if not places[0]:
                raise RuntimeError(f"{case}: an input of the graph is no operand") from None
            return Code(generated.args[0], formulations[0].name, places[0])
    raise RuntimeError(f"nothing was compiled for {case}")
