"""Inspect and check the code of the GPU kernels without a GPU: ``python -m benchmarks.codegen``.

For each case, the command calls ``int4_lora_linear`` on fake tensors of an H200. It compiles the
code that Inductor generates for sm_90, and counts its instructions, registers and buffers. The
counts are only informative: on an H200 they did not predict which kernel is faster. Then the same
source runs in Triton's interpreter, and the conformance suite's rules judge the results. The
command exits with 1 if a result is wrong, or if code of ``split_k`` spills registers, has more than
three kernels for a layer (one more for each further slice of outputs), or a buffer of the weight's
size.

The cases are of the defaults on a GPU: ``magic_gemv`` for one token, ``split_k`` up to 64, and
``gemv`` for x in float32. Above, the default is ``tiles``, whose product is the vendor's GEMM and
has no source to inspect.

Source: ``docs/compiled.md`` for the defaults; ``docs/conformance.md``, "The verdict".
"""

import argparse
import json
import math
import pickle
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
import triton

from benchmarks.codegen import fake_cuda
from benchmarks.codegen.cases import Case, generate
from benchmarks.codegen.sass import compile_kernel

RESULTS = Path(__file__).parent.parent / "results"
SHAPES = ((4096, 4096), (11008, 4096))
GROUPS = (32, 64, 128, None)
TOKENS = (1, 16, 64)
FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4}  # bytes of the dtypes of buffers


def cases(quick):
    """Yield the cases; with ``quick`` only six."""
    for tokens in (1, 4):
        for symmetric in (True, False):
            if not quick or symmetric == (tokens == 1):
                yield Case(4096, 4096, tokens, symmetric=symmetric, dtype=torch.float32)
    if quick:
        for symmetric in (True, False):
            yield Case(4096, 4096, 1, symmetric=symmetric, dtype=torch.float16)
        yield Case(4096, 4096, 16, dtype=torch.float16)
        # 344 groups: slices of unequal length
        yield Case(1024, 11008, 4, 32, symmetric=False, dtype=torch.float16, reordered=True)
        return
    for dtype in (torch.bfloat16, torch.float16):
        for rows, columns in SHAPES:
            for tokens in TOKENS:
                for group in GROUPS if tokens < 64 else (128,):
                    for symmetric in (True, False):
                        yield Case(rows, columns, tokens, group, symmetric, dtype)
        for tokens in TOKENS:
            yield Case(4096, 11008, tokens, dtype=dtype)
            yield Case(6144, 4096, tokens, dtype=dtype, slices=(4096, 1024, 1024), bias=True)
            yield Case(4096, 4096, tokens, dtype=dtype, adapters=0)
            yield Case(4096, 4096, tokens, dtype=dtype, rank=512)
            yield Case(4096, 4096, tokens, dtype=dtype, reordered=True)
            yield Case(28672, 8192, tokens, dtype=dtype)


def counts(case, code):
    """Return the counts for the code of a case."""
    machines = {name: compile_kernel(source) for name, source in code.kernels.items()}
    spilled = [machine.spilled for launches in machines.values() for machine in launches]
    loads = {name: word_loads(source) for name, source in code.kernels.items()}
    name = max(loads, key=loads.get)
    (main,) = machines[name]  # of several launches, Inductor would choose at run time
    (length,) = re.findall(r" r0_numel = (\d+)", code.kernels[name])
    read = main.launch.get("R0_BLOCK", int(length)) if main.loops else int(length)
    weights = main.launch["XBLOCK"] * read * (1 if "tl.dot" in code.kernels[name] else 8)
    passes = -(-case.tokens // main.launch.get("YBLOCK", 1))
    between = [elements(shape, case) * FLOATS[dtype] for shape, dtype in code.buffers[:-1]]
    moved = case.floor_bytes() + (passes - 1) * case.packed_bytes() + 2 * sum(between)
    weight = case.rows * case.columns
    return {
        "case": str(case),
        "formulation": code.formulation,
        "digest": code.digest,
        "launch": main.launch,
        "kernels": len(code.launches),
        "weight_sized_buffers": sum(elements(shape, case) >= weight for shape, _ in code.buffers),
        "registers": main.registers,
        "spilled_bytes": max(spilled),
        "loads_per_word": loads[name],
        "instructions_per_weight": main.instructions_per(weights),
        "passes_over_the_weight": passes,
        "bytes_over_floor": moved / case.floor_bytes(),
    }


def missed(case, row):
    """Return the bars that the code of ``split_k`` misses."""
    if row["formulation"] != "split_k":
        return []
    bars = {
        "spilled_bytes": 0,
        "kernels": 2 + len(case.slices or (case.rows,)) * (case.adapters > 0),
        "weight_sized_buffers": 0,
    }
    return [
        f"{name} {row[name]}, at most {most}" for name, most in bars.items() if row[name] > most
    ]


def word_loads(source):
    """Return the number of loads from the int32 pointer with the most loads in a kernel."""
    pointers = re.findall(r"'(\w+)': '\*i32'", source)
    return max((len(re.findall(rf"tl\.load\({name}\b", source)) for name in pointers), default=0)


def elements(shape, case):
    """Return the number of elements of a buffer; a symbol in its shape means the token count."""
    lengths = [length.strip() for length in shape.split(",") if length.strip()]
    return math.prod(case.tokens if name.startswith("s") else int(name) for name in lengths)


def interpret(generated):
    """Return the fault of each (case, code), or None if its results are right, by case name.

    Raises:
        RuntimeError: the interpreter ran different code from the given code.
    """
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        file.write(pickle.dumps(generated))
        file.flush()
        command = [sys.executable, "-m", "benchmarks.codegen.interpreted", file.name]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    verdicts = [json.loads(line) for line in output.splitlines()]
    if [verdict["digest"] for verdict in verdicts] != [code.digest for _, code in generated]:
        raise RuntimeError("the interpreter ran other code than was counted")
    return {verdict["case"]: verdict["wrong"] for verdict in verdicts}


def table(rows):
    """Return the rows as a table in Markdown."""
    head = ("case", "formulation", "kernels", "weight buffers", "registers", "bytes spilled",
            "loads a word", "instructions a weight", "passes", "bytes / floor",
            "interpreted")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = (
            row["case"], row["formulation"], row["kernels"], row["weight_sized_buffers"],
            row["registers"], row["spilled_bytes"], row["loads_per_word"],
            f"{row['instructions_per_weight']:.2f}", row["passes_over_the_weight"],
            f"{row['bytes_over_floor']:.2f}", row["interpreted"],
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main():
    """Count every case's code, interpret what can be interpreted, and print the table."""
    parser = argparse.ArgumentParser(description="Read and check the GPU kernels without a GPU.")
    parser.add_argument("--quick", action="store_true", help="read six cases only")
    parser.add_argument("--count-only", action="store_true", help="do not run the interpreter")
    parser.add_argument("--output", help="write results/OUTPUT.json and results/OUTPUT.md")
    options = parser.parse_args()
    fake_cuda.install()
    rows, generated, started = [], [], time.perf_counter()
    for case in cases(options.quick):
        code = generate(case)
        rows.append(counts(case, code))
        rows[-1]["missed"] = missed(case, rows[-1])
        multiplied_wrong = case.dtype == torch.bfloat16  # by Triton's interpreter
        if not (multiplied_wrong or options.count_only):
            generated.append((case, code))
        print(f"{time.perf_counter() - started:.0f} s: {case}", file=sys.stderr, flush=True)
    verdicts = interpret(generated) if generated else {}
    for row in rows:
        wrong = verdicts.get(row["case"], "not run")
        row["interpreted"] = "right" if wrong is None else wrong
    print(table(rows))
    failed = sum(wrong is not None for wrong in verdicts.values())
    print(f"{len(rows)} cases, {len(generated)} of them interpreted, {failed} wrong")
    for row in rows:
        if row["missed"]:
            failed += 1
            print(f"{row['case']}: {'; '.join(row['missed'])}")
    if options.output:
        machine = {"date": date.today().isoformat(), "target": "sm_90, no GPU",
                   "torch": torch.__version__, "triton": triton.__version__}  # fmt: skip
        file = RESULTS / f"{options.output}.json"
        file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(rows) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
