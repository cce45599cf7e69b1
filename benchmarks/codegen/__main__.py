"""Reads the machine code of the GPU kernels without a GPU: ``python -m benchmarks.codegen``.

For each case: the product's own call on fake tensors of an H200, as Inductor generates it, compiled
for sm_90; then some blocks of the same source in Triton's interpreter in float16, against the
reference, under two sets of adapter ids. Prints a row for each case and exits with 1 if one is
worse than the bars.

Source: the bars are those of ``benchmarks/results/README.md``.
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
TOKENS = (1, 4)
MOST_PER_WEIGHT = {"magic_gemv": 3.5}  # instructions, at group 128
KERNELS, RMS_OVER_EAGER = 2, 2.0
FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4}  # bytes of the dtypes of buffers


def cases(quick):
    """Yield the cases; with ``quick`` a few of them."""
    if quick:
        for tokens in TOKENS:
            for symmetric in (True, False):
                yield Case(4096, 4096, tokens, symmetric=symmetric, dtype=torch.float16)
        return
    for dtype in (torch.bfloat16, torch.float16):
        for rows, columns in SHAPES:
            for tokens in TOKENS:
                for group in GROUPS:
                    for symmetric in (True, False):
                        yield Case(rows, columns, tokens, group, symmetric, dtype)
        for tokens in TOKENS:
            yield Case(4096, 11008, tokens, dtype=dtype)
            yield Case(6144, 4096, tokens, dtype=dtype, slices=(4096, 1024, 1024), bias=True)
            yield Case(4096, 4096, tokens, dtype=dtype, adapters=0)


def row(case, code):
    """Return what the code of a case is made of."""
    machines = {name: compile_kernel(source) for name, source in code.kernels.items()}
    name, loads = max(((name, words_loads(source)) for name, source in code.kernels.items()),
                      key=lambda one: one[1])  # fmt: skip
    (main,) = machines[name]  # more launches than one would be chosen among at run time
    tile = main.launch["XBLOCK"] * main.launch["R0_BLOCK"]
    passes = -(-case.tokens // main.launch.get("YBLOCK", 1))
    between = [elements(shape, case) * FLOATS[dtype] for shape, dtype in code.buffers[:-1]]
    moved = case.floor_bytes() + (passes - 1) * case.packed_bytes() + 2 * sum(between)
    weight = case.rows * case.columns
    return {
        "case": str(case),
        "formulation": case.formulation().name,
        "digest": code.digest,
        "launch": main.launch,
        "kernels": len(code.launches),
        "weight_sized_buffers": sum(elements(shape, case) >= weight for shape, _ in code.buffers),
        "registers": main.registers,
        "spilled_bytes": max(one.spilled for several in machines.values() for one in several),
        "loads_per_word": loads,
        "instructions_per_weight": main.instructions_per(8 * tile),
        "passes_over_the_weight": passes,
        "bytes_over_floor": moved / case.floor_bytes(),
    }


def words_loads(source):
    """Return how often a kernel loads from the pointer to int32 that it loads from most."""
    pointers = re.findall(r"'(\w+)': '\*i32'", source)
    return max((len(re.findall(rf"tl\.load\({name}\b", source)) for name in pointers), default=0)


def elements(shape, case):
    """Return the elements of a buffer whose shape may name the number of tokens."""
    lengths = [length.strip() for length in shape.split(",") if length.strip()]
    return math.prod(case.tokens if one.startswith("s") else int(one) for one in lengths)


def misses(found):
    """Return the bars that a row does not reach, in words."""
    most = MOST_PER_WEIGHT[found["formulation"]]
    said = []
    if found["kernels"] > KERNELS:
        said.append(f"{found['kernels']} kernels")
    if found["weight_sized_buffers"]:
        said.append("a buffer of the weight's size")
    if found["spilled_bytes"]:
        said.append(f"{found['spilled_bytes']} bytes spilled")
    if "g128" in found["case"] and found["instructions_per_weight"] > most:
        said.append(f"{found['instructions_per_weight']:.2f} instructions, bar {most}")
    ran = found.get("interpreted")
    if ran and not ran["of_bound"] <= 1:
        said.append(f"off by {ran['of_bound']:.2f} of the bound")
    if ran and not ran["rms_over_eager"] <= RMS_OVER_EAGER:
        said.append(f"rms {ran['rms_over_eager']:.2f} x eager's")
    return said


def interpret(generated):
    """Return the interpreter's findings on (case, code) in float16, by the case's name."""
    asked = []
    for case, code in generated:
        one = case.formulation()
        asked.append((case, code, one.weight_rounded, one.base_rounded))
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        file.write(pickle.dumps(asked))
        file.flush()
        command = [sys.executable, "-m", "benchmarks.codegen.interpreted", file.name]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return {one["case"]: one for one in map(json.loads, said.splitlines())}


def table(rows):
    """Return the rows as a table in Markdown."""
    head = ("case", "formulation", "kernels", "weight buffers", "registers", "spilled",
            "loads a word", "instructions a weight", "passes", "bytes / floor",
            "of the bound", "rms / eager", "misses")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in rows:
        ran = one.get("interpreted")
        cells = (
            one["case"], one["formulation"], one["kernels"], one["weight_sized_buffers"],
            one["registers"], one["spilled_bytes"], one["loads_per_word"],
            f"{one['instructions_per_weight']:.2f}", one["passes_over_the_weight"],
            f"{one['bytes_over_floor']:.2f}",
            f"{ran['of_bound']:.2f}" if ran else "-",
            f"{ran['rms_over_eager']:.2f}" if ran else "-",
            "; ".join(one["misses"]),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main():
    """Read every case's code, run what can be run, print, and say whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="six cases only")
    parser.add_argument("--count-only", action="store_true", help="interpret nothing")
    parser.add_argument("--output", help="write results/OUTPUT.json and .md")
    options = parser.parse_args()
    fake_cuda.install()
    rows, ran, started = [], [], time.perf_counter()
    for case in cases(options.quick):
        code = generate(case)
        rows.append(row(case, code))
        wrong = case.dtype == torch.bfloat16  # Triton's interpreter multiplies it wrongly
        if not (wrong or options.count_only):
            ran.append((case, code))
        print(f"{time.perf_counter() - started:.0f} s: {case}", file=sys.stderr, flush=True)
    found = interpret(ran) if ran else {}
    for one in rows:
        if one["case"] in found:
            one["interpreted"] = found[one["case"]]
            if one["interpreted"]["digest"] != one["digest"]:
                raise RuntimeError(f"{one['case']}: other code was interpreted than was counted")
        one["misses"] = misses(one)
    print(table(rows))
    bad = sum(bool(one["misses"]) for one in rows)
    print(f"{len(rows)} cases, {len(ran)} of them interpreted, {bad} worse than a bar")
    if options.output:
        machine = {"date": date.today().isoformat(), "target": "sm_90, no GPU",
                   "torch": torch.__version__, "triton": triton.__version__}  # fmt: skip
        file = RESULTS / f"{options.output}.json"
        file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(rows) + "\n")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
