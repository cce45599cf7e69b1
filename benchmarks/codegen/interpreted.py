"""Generated code, run in Triton's interpreter on the CPU and held against the reference.

``python -m benchmarks.codegen.interpreted FILE`` is a process of its own, because Triton decides
when it is imported whether it interprets. FILE holds a pickled list of (case, code, whether the
weight is rounded, whether the base is); a line of JSON is printed for each.

Of the kernel that reads the words only some blocks of outputs are run, the same source with its own
numbers of programs: the first, the last, those on both sides of each slice's edge, and random ones.
The rest of y must stay as it was. Those at edges are run again with other adapter ids.

Source: https://triton-lang.org/main/programming-guide/chapter-3/debugging.html
"""

import contextlib
import dataclasses
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
from triton.runtime import interpreter

from benchmarks.codegen.cases import operand
from int4_lora.compiled.formulations.magic_numbers import EXPONENT_OF_ONE
from int4_lora.reference import LoRASlice, LoRAStack, error_bound, int4_lora_linear

OWN_TILES = {"XBLOCK": 32, "R0_BLOCK": 1024}  # of kernels whose launch Inductor chooses
RANDOM_BLOCKS = 2


class Kernel:
    """A kernel's source with the ``run`` that the wrapper calls.

    Args:
        name: of the function.
        source: of the module.
        outputs: outputs that a block must be run for where the launch is fixed, or None for all.
    """

    def __init__(self, name, source, outputs=None):
        from torch._inductor.runtime import triton_helpers
        from torch._inductor.runtime.triton_helpers import libdevice, math

        self.body = source[source.index("@triton.jit") :]
        fixed = re.search(r"config=(\{.*?\}),\n", source)
        self.outputs = outputs if fixed else None
        tiles = json.loads(fixed.group(1).replace("'", '"')) if fixed else OWN_TILES
        wanted = re.findall(r"(\w+BLOCK) : tl\.constexpr", source)
        self.tiles = {block: tiles[block] for block in wanted}
        file = f"<{name}>"
        linecache.cache[file] = (len(self.body), None, self.body.splitlines(keepends=True), file)
        names = {"triton": triton, "tl": tl, "tl_math": math, "libdevice": libdevice,
                 "triton_helpers": triton_helpers}  # fmt: skip
        exec(compile(self.body, file, "exec"), names)
        self.function = names[name]

    def run(self, *arguments, stream):
        """Run the blocks of the grid that are asked for."""
        given = dict(zip(self.function.arg_names, arguments, strict=False))
        grid = [1, 1, 1]
        for axis, number in re.findall(r"(\w)offset = tl\.program_id\((\d)\)", self.body):
            size, tile = int(given[f"{axis}numel"]), self.tiles[f"{axis.upper()}BLOCK"]
            grid[int(number)] = triton.cdiv(size, tile)
        if self.outputs is None:
            self.function[tuple(grid)](*arguments, **self.tiles)
            return
        if "num_programs" in self.body or "xoffset = tl.program_id(0)" not in self.body:
            raise RuntimeError("some blocks of a kernel that knows of the others")
        blocks = sorted({output // self.tiles["XBLOCK"] for output in self.outputs})
        with some_blocks(blocks, grid):
            self.function[(len(blocks), *grid[1:])](*arguments, **self.tiles)

    def written(self):
        """Return the outputs of the blocks that are run."""
        tile = self.tiles["XBLOCK"]
        blocks = {output // tile for output in self.outputs}
        return sorted(
            output for block in blocks for output in range(block * tile, block * tile + tile)
        )


@contextlib.contextmanager
def some_blocks(blocks, grid):
    """Make Triton's interpreter give the programs of the first axis other numbers."""
    builder = interpreter.interpreter_builder
    index, size = builder.set_grid_idx, builder.set_grid_dim

    def whole_grid(*_):
        size(*grid)

    with (
        mock.patch.object(builder, "set_grid_idx", lambda x, y, z: index(blocks[x], y, z)),
        mock.patch.object(builder, "set_grid_dim", whole_grid),
    ):
        yield


def run(code, arguments, outputs):
    """Return what generated code returns, and which outputs of it the blocks that ran wrote.

    Args:
        code: of a case.
        arguments: CPU tensors; buffers that the code makes are poisoned with NaN.
        outputs: those that the blocks of the kernel with a fixed launch must be run for.
    """
    from torch._inductor.async_compile import AsyncCompile

    raw_stream = "from torch._C import _cuda_getCurrentRawStream as get_raw_stream"
    text = code.text.replace(raw_stream, "get_raw_stream = lambda device: 0")
    scope, kernels = {"__name__": "generated"}, []

    def kernel(self, name, source, **_):
        kernels.append(Kernel(name, source, outputs))
        return kernels[-1]

    with (
        mock.patch.object(AsyncCompile, "triton", kernel),
        mock.patch.object(AsyncCompile, "wait", return_value=None),
        mock.patch.object(torch._C._dynamo.guards, "_empty_strided_cuda", poisoned),
        mock.patch.object(torch.cuda, "_DeviceGuard", mock.MagicMock()),
        mock.patch.object(torch.cuda, "set_device", return_value=None),
    ):
        exec(compile(text, "<generated>", "exec"), scope)
        (y,) = scope["call"](list(arguments))
    (main,) = [one for one in kernels if one.outputs is not None]
    return y, [output for output in main.written() if output < y.shape[1]]


def poisoned(size, stride, dtype):
    """Return a buffer as the wrapper allocates it, full of NaN."""
    return torch.empty_strided(size, stride, dtype=dtype).fill_(float("nan"))


def operands_of(case):
    """Return operands of ``int4_lora_linear`` with values."""
    generator = torch.Generator().manual_seed(case.tokens)

    def make(shape, dtype):
        if dtype in (torch.int16, torch.int32):
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


def chosen(case, number):
    """Return outputs whose blocks are run: at every edge, and a number of random ones."""
    edges, start = {0, case.rows - 1}, 0
    for rows in case.slices:
        start += rows
        edges |= {start - 1, min(start, case.rows - 1)}
    random = torch.randint(case.rows, (number,), generator=torch.Generator().manual_seed(0))
    return sorted(edges | set(random.tolist()))


def some_rows(packed, lora, bias, rows):
    """Return the reference's weight, slices and bias of some outputs: runs of eight of them."""
    zeros = packed.zero_point
    weight = dataclasses.replace(
        packed,
        packed=packed.packed[rows],
        scale=packed.scale[rows],
        shape=(len(rows), packed.in_features),
        zero_point=None if zeros is None else zeros[rows[::8] // 8],
    )
    slices, start = [], 0
    for one in lora.slices if lora is not None else ():
        own = rows[(rows >= one.start) & (rows < one.stop)] - one.start
        stack = LoRAStack(one.a, one.bt[:, :, own].transpose(1, 2), one.scaling)
        slices.append(LoRASlice(stack, start))
        start += len(own)
    return weight, slices or None, None if bias is None else bias[rows]


def check(case, code, weight_rounded, base_rounded):
    """Return the largest share of the bound that an element is off by, and the rms over eager's."""
    x, weight, lora, ids, bias = operands_of(case)
    packed, shares, errors, owns = weight.packed_weight(), [], [], []
    for step in (0,) if lora is None else (0, 2):
        now = None if ids is None else (ids + 1 + step) % (case.adapters + 1) - 1
        operands = x, weight, lora, now, bias
        given = [case.tokens if one == "tokens" else operand(one, operands) for one in code.inputs]
        y, written = run(code, given, chosen(case, 0 if step else RANDOM_BLOCKS))
        rows, rest = torch.tensor(written), torch.ones(case.rows, dtype=torch.bool)
        rest[rows] = False
        if not y[:, rest].isnan().all():
            raise RuntimeError(f"{case}: a block wrote another's outputs")
        part, slices, own_bias = some_rows(packed, lora, bias, rows)
        exact = int4_lora_linear(x.double(), part, slices, now, own_bias)
        eager = int4_lora_linear(x, part, slices, now, own_bias)
        flags = {"weight_rounded": weight_rounded, "base_rounded": base_rounded}
        bound = error_bound(x, part, slices, now, own_bias, **flags)
        error = y[:, rows].double() - exact
        shares.append((error.abs() / bound).nan_to_num(nan=torch.inf).max())
        errors.append(error.flatten())
        owns.append((eager.double() - exact).flatten())
    error, own = (torch.cat(one).square().mean().sqrt() for one in (errors, owns))
    return {
        "case": str(case),
        "digest": code.digest,
        "of_bound": float(max(shares)),
        "rms_over_eager": float(error / own),
    }


def main():
    """Check every case of the file."""
    for case, code, *flags in pickle.loads(Path(sys.argv[1]).read_bytes()):
        print(f"interpreted: {case}", file=sys.stderr, flush=True)
        print(json.dumps(check(case, code, *flags)), flush=True)


if __name__ == "__main__":
    main()
