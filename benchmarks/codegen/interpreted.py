"""Generated code, run in Triton's interpreter on the CPU and held against the reference.

``python -m benchmarks.codegen.interpreted FILE`` is a process of its own, because Triton decides
when it is imported whether it interprets. FILE holds a pickled list of (case, code, whether the
weight is rounded, whether the base is); a line of JSON is printed for each.

Source: https://triton-lang.org/main/programming-guide/chapter-3/debugging.html
"""

import json
import linecache
import os
import pickle
import re
import sys
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch  # the environment comes first
import triton
import triton.language as tl

from benchmarks.codegen.cases import operand
from int4_lora.compiled.magic_numbers import EXPONENT_OF_ONE
from int4_lora.reference import LoRASlice, LoRAStack, error_bound, int4_lora_linear

SMALL_TILES = {"XBLOCK": 4, "R0_BLOCK": 1024}  # of kernels whose launch Inductor chooses


class Kernel:
    """A kernel's source with the ``run`` that the wrapper calls."""

    def __init__(self, name, source, **_):
        from torch._inductor.runtime import triton_helpers
        from torch._inductor.runtime.triton_helpers import libdevice, math

        self.body = source[source.index("@triton.jit") :]
        fixed = re.search(r"config=(\{.*?\}),\n", source)
        tiles = json.loads(fixed.group(1).replace("'", '"')) if fixed else SMALL_TILES
        wanted = re.findall(r"(\w+BLOCK) : tl\.constexpr", source)
        self.tiles = {block: tiles[block] for block in wanted}
        file = f"<{name}>"
        linecache.cache[file] = (len(self.body), None, self.body.splitlines(keepends=True), file)
        names = {"triton": triton, "tl": tl, "tl_math": math, "libdevice": libdevice,
                 "triton_helpers": triton_helpers}  # fmt: skip
        exec(compile(self.body, file, "exec"), names)
        self.function = names[name]

    def run(self, *arguments, stream):
        """Run every block of the grid."""
        given = dict(zip(self.function.arg_names, arguments, strict=False))
        grid = [1, 1, 1]
        for axis, number in re.findall(r"(\w)offset = tl\.program_id\((\d)\)", self.body):
            size, tile = int(given[f"{axis}numel"]), self.tiles[f"{axis.upper()}BLOCK"]
            grid[int(number)] = triton.cdiv(size, tile)
        self.function[tuple(grid)](*arguments, **self.tiles)


def run(code, arguments):
    """Return the outputs of generated code on CPU tensors; its buffers are poisoned with NaN."""
    from torch._inductor.async_compile import AsyncCompile

    raw_stream = "from torch._C import _cuda_getCurrentRawStream as get_raw_stream"
    text = code.text.replace(raw_stream, "get_raw_stream = lambda device: 0")
    scope = {"__name__": "generated"}
    with (
        mock.patch.object(
            AsyncCompile, "triton", lambda self, name, source, **_: Kernel(name, source)
        ),
        mock.patch.object(AsyncCompile, "wait", return_value=None),
        mock.patch.object(torch._C._dynamo.guards, "_empty_strided_cuda", poisoned),
        mock.patch.object(torch.cuda, "_DeviceGuard", mock.MagicMock()),
        mock.patch.object(torch.cuda, "set_device", return_value=None),
    ):
        exec(compile(text, "<generated>", "exec"), scope)
        return scope["call"](list(arguments))


def poisoned(size, stride, dtype):
    """Return a buffer as the wrapper allocates it, full of NaN."""
    return torch.empty_strided(size, stride, dtype=dtype).fill_(float("nan"))


def operands_of(case):
    """Return operands of ``int4_lora_linear`` with values."""
    generator = torch.Generator().manual_seed(case.tokens)

    def make(shape, dtype):
        if dtype == torch.int32:
            return torch.randint(-(2**31), 2**31, shape, generator=generator).to(dtype)
        if dtype == torch.int64:
            return torch.arange(shape[0]) % (case.adapters + 1) - 1
        return torch.randn(shape, generator=generator).to(dtype)

    operands = case.operands(make)
    operands[1].exponent.fill_(EXPONENT_OF_ONE)
    operands[1].scale.mul_(0.01)
    for one in operands[2].slices if operands[2] is not None else ():
        one.a.div_(case.columns**0.5)
    return operands


def check(case, code, weight_rounded, base_rounded):
    """Return the largest share of the bound that an element is off by, and the rms over eager's."""
    operands = operands_of(case)
    x, weight, lora, ids, bias = operands
    slices = None
    if lora is not None:
        slices = [
            LoRASlice(LoRAStack(one.a, one.bt.transpose(1, 2), one.scaling), one.start)
            for one in lora.slices
        ]
    given = [case.tokens if name == "tokens" else operand(name, operands) for name in code.inputs]
    (y,) = run(code, given)
    packed = weight.packed_weight()
    exact = int4_lora_linear(x.double(), packed, slices, ids, bias)
    eager = int4_lora_linear(x, packed, slices, ids, bias)
    flags = {"weight_rounded": weight_rounded, "base_rounded": base_rounded}
    bound = error_bound(x, packed, slices, ids, bias, **flags)
    error, own = ((one.double() - exact) for one in (y, eager))
    return {
        "case": str(case),
        "digest": code.digest,
        "of_bound": float((error.abs() / bound).nan_to_num(nan=torch.inf).max()),
        "rms_over_eager": float(error.square().mean().sqrt() / own.square().mean().sqrt()),
    }


def main():
    """Check every case of the file."""
    for case, code, *flags in pickle.loads(Path(sys.argv[1]).read_bytes()):
        print(f"interpreted: {case}", file=sys.stderr, flush=True)
        print(json.dumps(check(case, code, *flags)), flush=True)


if __name__ == "__main__":
    main()
