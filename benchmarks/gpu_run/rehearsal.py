"""Compile the kernels of a run for an H200 where there is none: ``--rehearse``.

Each layer of the run, and each launch of its sweep, is compiled from fake tensors to machine code.
What does not compile, or spills registers, shows before the time of a GPU is spent. Nothing runs:
the results of all parts are rehearsed on a CPU, with the formulations of a CPU.
"""

import dataclasses

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.codegen import fake_cuda
from benchmarks.codegen.cases import Case, generate, on_gpu
from benchmarks.codegen.sass import compile_kernel
from benchmarks.command import say
from benchmarks.gpu_run.sweep import can_vary, variants
from benchmarks.judgement import reason
from benchmarks.tables import markdown
from int4_lora.compiled.selection.choice import default

__all__ = ["rehearse"]

FAILED = "does not compile"


def rehearse(options):
    """Compile, and print the table; return 1 if something does not compile.

    Args:
        options: the layer benchmark's options.
    """
    fake_cuda.install()
    cases = [
        Case(*shape, tokens, options.group_size, dtype=getattr(torch, dtype))
        for dtype in options.dtypes
        for shape in options.shapes
        for tokens in options.tokens
    ]
    rows = [_row(case, str(case), default) for case in cases]
    for case in cases:
        if (case.rows, case.columns) == options.shapes[0]:
            base = dataclasses.replace(case, adapters=0)
            for launched in _launches(base):
                rows.append(_row(base, str(base), lambda *_, launched=launched: launched))
    print(markdown(["layer", "formulation", "kernels", "registers", "bytes spilled"], rows))
    return 1 if any(row[1].startswith(FAILED) for row in rows) else 0


def _launches(case):
    """Return the formulations of the sweep, of the default formulation of a case."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = case.operands(on_gpu)[1]
        formulation = default(weight, case.dtype, case.tokens)
        return variants(formulation, weight, case.tokens) if can_vary(formulation) else []


def _row(case, name, choose):
    """Return a row: the layer, its formulation, its kernels, their most registers and spills."""
    try:
        code = generate(case, choose)
        machines = [
            machine for source in code.kernels.values() for machine in compile_kernel(source)
        ]
    except Exception as error:  # the rest is still compiled
        row = [name, f"{FAILED}: {reason(error)}", "-", "-", "-"]
    else:
        registers = max((machine.registers for machine in machines), default=0)
        spilled = max((machine.spilled for machine in machines), default=0)
        row = [name, code.formulation, *map(str, (len(code.launches), registers, spilled))]
    say(", ".join(row))
    return row
