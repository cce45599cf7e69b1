"""Run generated code in Triton's interpreter on the CPU, and judge the results.

``python -m benchmarks.codegen.interpreted FILE`` runs in a separate process, because Triton decides
at import whether to interpret. FILE holds a pickled list of (case, code). One line of JSON is
printed for each.

The kernel that reads the words runs only for some blocks of outputs, each with its program number
in the whole grid: the first, the last, those on both sides of each slice's edge, and random blocks.
The rest of y must stay NaN. Every layer with adapters runs twice, with different adapter ids.

Source: https://triton-lang.org/main/programming-guide/chapter-3/debugging.html
"""

import contextlib
import json
import linecache
import os
import pickle
import re
import sys
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch  # after the environment variables are set
import triton
import triton.language as tl
from triton.runtime import interpreter

from int4_lora.compiled.formulations import FORMULATIONS
from int4_lora.compiled.layouts.interleaved import EXPONENT_OF_ONE
from int4_lora.reference.conformance import check_linear
from int4_lora.reference.conformance.judging.verdict import RMS_ELEMENTS
from int4_lora.reference.lora_stack import rows_of

# for kernels whose tiles Inductor would choose: of sums, and of other kernels
TILES_OF_SUMS = {"XBLOCK": 32, "R0_BLOCK": 1024}
OWN_TILES = {"XBLOCK": 8192, "YBLOCK": 16}
RUN = 64  # neighbouring outputs that are judged together, so that fewer blocks run


class Kernel:
    """A kernel's source, with the ``run`` that the wrapper calls.

    Args:
        name: the name of the kernel's function.
        source: the source of the kernel's module.
        outputs: the outputs to compute, if the kernel reads the words; other kernels run whole.
        rows: out_features of the layer.
    """

    def __init__(self, name, source, outputs, rows):
        from torch._inductor.runtime import triton_helpers
        from torch._inductor.runtime.triton_helpers import libdevice, math

        self.body = source[source.index("@triton.jit") :]
        fixed = re.search(r"config=(\{.*?\}),\n", source)
        reads_words = "'*i32'" in source
        self.outputs, self.rows = outputs if reads_words else None, rows
        self.written = None
        blocks = re.findall(r"(\w+BLOCK) : tl\.constexpr", source)
        tiles = OWN_TILES if "rnumel" not in self.body else TILES_OF_SUMS
        tiles = json.loads(fixed.group(1).replace("'", '"')) if fixed else tiles
        self.tiles = {block: tiles[block] for block in blocks}
        file = f"<{name}>"
        linecache.cache[file] = (len(self.body), None, self.body.splitlines(keepends=True), file)
        names = {"triton": triton, "tl": tl, "tl_math": math, "libdevice": libdevice,
                 "triton_helpers": triton_helpers}  # fmt: skip
        exec(compile(self.body, file, "exec"), names)
        self.function = names[name]

    def run(self, *arguments, stream):
        """Run the blocks that write ``outputs``, or the whole grid."""
        given = dict(zip(self.function.arg_names, arguments, strict=False))
        grid = [1, 1, 1]
        for axis, number in re.findall(r"(\w)offset = tl\.program_id\((\d)\)", self.body):
            size, tile = int(given[f"{axis}numel"]), self.tiles[f"{axis.upper()}BLOCK"]
            grid[int(number)] = triton.cdiv(size, tile)
        if self.outputs is None:
            self.function[tuple(grid)](*arguments, **self.tiles)
            return
        found = re.search(r"xoffset = tl\.program_id\((\d)\)", self.body)
        if "num_programs" in self.body or found is None:
            raise RuntimeError("a kernel whose blocks depend on one another cannot be run in part")
        axis = int(found.group(1))
        tile = self.tiles["XBLOCK"]
        # axis x may hold tokens and outputs, or the outputs of a part
        length = int(given["xnumel"])
        starts, part = range(0, length, self.rows), min(length, self.rows)
        places = {start + output % part for start in starts for output in self.outputs}
        blocks = sorted({place // tile for place in places})
        with some_blocks(blocks, axis, grid):
            few = [len(blocks) if each == axis else grid[each] for each in range(len(grid))]
            self.function[tuple(few)](*arguments, **self.tiles)
        self.written = torch.zeros(length, dtype=torch.bool)
        for block in blocks:
            self.written[block * tile : (block + 1) * tile] = True
        self.written = self.written.repeat(self.rows // part).view(-1, self.rows)


@contextlib.contextmanager
def some_blocks(blocks, axis, grid):
    """Give the programs of an axis the numbers ``blocks`` in Triton's interpreter."""
    builder = interpreter.interpreter_builder
    index, size = builder.set_grid_idx, builder.set_grid_dim

    def whole_grid(*_):
        size(*grid)

    def of_whole_grid(*place):
        index(*[blocks[at] if each == axis else at for each, at in enumerate(place)])

    with (
        mock.patch.object(builder, "set_grid_idx", of_whole_grid),
        mock.patch.object(builder, "set_grid_dim", whole_grid),
    ):
        yield


def run(case, code, arguments, outputs):
    """Run generated code; return its result, and a mask of the elements that it should write.

    The buffers that the code allocates are filled with NaN.

    Args:
        case: the layer.
        code: the code generated for the layer.
        arguments: the wrapper's arguments, as CPU tensors.
        outputs: the outputs that the kernel that reads the words must write.
    """
    from torch._inductor.async_compile import AsyncCompile

    raw_stream = "from torch._C import _cuda_getCurrentRawStream as get_raw_stream"
    text = code.text.replace(raw_stream, "get_raw_stream = lambda device: 0")
    scope, kernels = {"__name__": "generated"}, []

    def kernel(self, name, source, **_):
        kernels.append(Kernel(name, source, outputs, case.rows))
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
    (main,) = [kernel for kernel in kernels if kernel.outputs is not None]
    return y, main.written.expand_as(y)


def poisoned(size, stride, dtype):
    """Return a buffer filled with NaN, instead of uninitialised memory."""
    return torch.empty_strided(size, stride, dtype=dtype).fill_(float("nan"))


def operands_of(case):
    """Return random operands of ``int4_lora_linear``."""
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
    if case.reordered:
        order = torch.randperm(case.columns, generator=generator)
        operands[1].order.copy_(order)
        group = torch.arange(case.columns, dtype=torch.int32) // (case.columns // case.groups)
        operands[1].g_idx.index_copy_(0, order, group)
    for part in operands[2].slices if operands[2] is not None else ():
        part.a.div_(case.columns**0.5)
    return operands


def chosen(case, calls):
    """Return the outputs to judge: those at every edge, and enough random ones for the rms rule."""
    edges, start = {0, case.rows - 1}, 0
    for rows in case.slices:
        start += rows
        edges |= {start - 1, min(start, case.rows - 1)}
    runs = -(-RMS_ELEMENTS // (calls * case.tokens * RUN))
    random = torch.randperm(case.rows // RUN, generator=torch.Generator().manual_seed(0))[:runs]
    neighbours = (RUN * random[:, None] + torch.arange(RUN)).flatten()
    return sorted(edges | set(neighbours.tolist()))


def check(case, code):
    """Return the fault of the code's results, or None if they are right."""
    x, weight, lora, ids, bias = operands_of(case)
    slices = lora.slices if lora is not None else ()
    tensors = [tensor for part in slices for tensor in part.tensors]
    calls = [None]
    if ids is not None:
        calls = [(ids + 1 + step) % (case.adapters + 1) - 1 for step in (0, 2)]
    outputs, results = chosen(case, len(calls)), []
    for ids_of_call in calls:
        fixed = (bias, *tensors, *weight.tensors)
        given = (case.tokens, x, ids_of_call, *fixed)
        arguments = [given[place] for place in code.places]
        y, written = run(case, code, arguments, outputs)
        if not y[~written].isnan().all():
            return "a block wrote another block's outputs"
        results.append(y[:, outputs])
    index = torch.tensor(outputs)
    formulation = FORMULATIONS[code.formulation]
    finding = check_linear(
        torch.cat(results),
        torch.cat([x] * len(calls)),
        weight.packed_weight().rows(index),
        rows_of([part.lora_slice() for part in slices], index) or None,
        None if ids is None else torch.cat(calls),
        None if bias is None else bias[index],
        weight_rounded=formulation.weight_rounded,
        base_rounded=formulation.base_rounded,
    )
    return None if finding is None else finding.message


def main():
    """Check every case of the file."""
    for case, code in pickle.loads(Path(sys.argv[1]).read_bytes()):
        print(f"interpreted: {case}", file=sys.stderr, flush=True)
        wrong = check(case, code)
        print(json.dumps({"case": str(case), "digest": code.digest, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main()
