"""Measure INT4 experts beside dense ones: ``python -m benchmarks.experts``.

A stack of layers of Qwen3-30B-A3B's sizes: decoding of few rows, and prefill, without adapters and
with four. Print the table; ``--output NAME`` writes ``results/NAME.json``, ``.md`` and ``.png``. In
each round every contender runs once, in a new random order, on a routing of its own. The floor is
the bytes of the used experts over the bandwidth of a copy, measured in the same run.

Source: ``benchmarks/results/README.md``.
"""

import argparse
import functools
import os
import sys
import time

import torch

from benchmarks.command import finish, say
from benchmarks.expert_layers import ExpertLayer, Sizes, routing, wrong_numbers
from benchmarks.judgement import reason
from benchmarks.limits import Limit, judgement, judgements_table
from benchmarks.machine import chosen_device, in_a_line, machine
from benchmarks.medians import median_and_spread
from benchmarks.tables import markdown, number, with_spread
from benchmarks.turns import shuffled

CONTENDERS = {
    "ours": ExpertLayer.ours,
    "ours + LoRA": ExpertLayer.ours_with_lora,
    "dense": ExpertLayer.dense_eager,
}
ROUTINGS = 8  # of a cell, used in turn
DECODE_SHARE = Limit(least=0.5)
LORA_RATIO = Limit(most=1.15)


def options_of(arguments):
    """Return the checked options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__)
    parser.add_argument("--output", help="write results/OUTPUT.json, .md and .png")
    numbers = {
        "hidden": (2048, "width of x"),
        "inter": (768, "width between up and down"),
        "experts": (128, "experts of a layer"),
        "chosen": (8, "experts of a token"),
        "layers": (2, "layers of the stack"),
        "adapters": (4, "adapters, a token for each in turn"),
        "rank": (16, "rank of the adapters"),
        "rounds": (40, "the most rounds of a cell"),
        "threads": (os.cpu_count(), "of torch"),
    }
    for name, (value, what) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} (%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 512], help="rows of x")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--budget", type=float, default=40, help="seconds of a cell (%(default)s)")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds: 2 or more, got {options.rounds}")
    chosen_device(parser, "cpu")
    return options


def stack_of(options, group_size):
    """Return the layers of the stack."""
    sizes = Sizes(
        options.hidden,
        options.inter,
        options.experts,
        options.chosen,
        group_size,
        options.adapters,
        options.rank,
    )
    return [ExpertLayer(sizes, seed) for seed in range(options.layers)]


@torch.inference_mode()
def cell(layers, tokens, options):
    """Return the row of one number of tokens.

    Args:
        layers: the stack.
        tokens: rows of x.
        options: the options.
    """
    batches = [
        [routing(layer.sizes, tokens, 100 * number + index) for index, layer in enumerate(layers)]
        for number in range(ROUTINGS)
    ]
    ready, refused = {}, {}
    for name, call in CONTENDERS.items():
        try:
            wrong = _judged(name, call, layers[0], batches[0][0])
        except Exception as error:  # the other contenders are still measured
            wrong = reason(error)
        (refused if wrong else ready)[name] = wrong or call
    seconds = {name: [] for name in ready}
    started = time.perf_counter()
    for turn, order in shuffled(ready, options.rounds, seed=tokens):
        for name in order:
            taken = _run(ready[name], layers, batches[turn % ROUTINGS])
            if turn:
                seconds[name].append(taken)
        if turn >= 2 and time.perf_counter() - started > options.budget:
            break
    return {
        "group_size": layers[0].sizes.group_size,
        "tokens": tokens,
        "seconds": {name: median_and_spread(values) for name, values in seconds.items()},
        "rounds": len(next(iter(seconds.values()), [])),
        "bytes": _bytes(layers, batches),
        "refused": refused,
    }


def _judged(name, call, layer, batch):
    """Return why a contender's result is wrong, or None."""
    x, ids, p, adapter_ids = batch
    with_lora = adapter_ids if name == "ours + LoRA" else None
    return wrong_numbers(layer, call(layer, *batch), x, ids, p, with_lora)


def _run(call, layers, batch):
    """Return the seconds that a pass through the stack takes."""
    started = time.perf_counter()
    for layer, operands in zip(layers, batch, strict=True):
        call(layer, *operands)
    return time.perf_counter() - started


def _bytes(layers, batches):
    """Return the bytes that the stack reads at least, by contender, in the mean of the routings."""
    total = dict.fromkeys(CONTENDERS, 0)
    for batch in batches:
        for layer, (_, ids, _, adapter_ids) in zip(layers, batch, strict=True):
            total["ours"] += layer.bytes_read(ids)
            total["ours + LoRA"] += layer.bytes_read(ids, adapter_ids)
            total["dense"] += layer.dense_bytes_read(ids)
    return {name: value / len(batches) for name, value in total.items()}


def shares(row, copy_bytes_per_second):
    """Return the share of the bandwidth that each contender reaches with the least bytes."""
    return {
        name: row["bytes"][name] / copy_bytes_per_second / measured["median"]
        for name, measured in row["seconds"].items()
    }


def bars(rows):
    """Return the judgements: decoding of one row against the bandwidth, and adapters' cost."""
    found = []
    for row in rows:
        named = f"g{row['group_size']}, {row['tokens']} tokens"
        if row["tokens"] == 1:
            share = row["share_of_copy"].get("ours")
            found.append(judgement(f"{named}: ours, share of a copy's", DECODE_SHARE, share))
        times = [row["seconds"].get(name) for name in ("ours + LoRA", "ours")]
        value = None if None in times else times[0]["median"] / times[1]["median"]
        found.append(judgement(f"{named}: ours + LoRA / ours", LORA_RATIO, value))
    return found


def report(host, rows, judgements):
    """Return the tables in Markdown."""
    head = ["group", "tokens", *(f"{name}, ms" for name in CONTENDERS), "dense / ours"]
    head += ["LoRA / ours", *(f"{name}: share" for name in CONTENDERS), "rounds"]
    lines = []
    for row in rows:
        seconds, share = row["seconds"], row["share_of_copy"]
        ours = seconds.get("ours")

        def against(name, ours=ours, seconds=seconds):
            known = ours is not None and name in seconds
            return number(seconds[name]["median"] / ours["median"]) if known else "-"

        lines.append(
            [
                *(str(row[name]) for name in ("group_size", "tokens")),
                *(with_spread(seconds.get(name), 1e3, 2) for name in CONTENDERS),
                against("dense"),
                against("ours + LoRA"),
                *(number(share.get(name)) for name in CONTENDERS),
                str(row["rounds"]),
            ]
        )
    left_out = {f"{name}: {why}" for row in rows for name, why in row["refused"].items()}
    speed = 1e-9 * host["copy_bytes_per_second"]
    return "\n\n".join(
        [
            f"{in_a_line(host)}. Medians of a pass through the stack. Share: the bytes of the used "
            f"experts and adapters over the time, of the {speed:.3g} GB/s of a copy.",
            markdown(head, lines),
            *(f"- not measured: {line}" for line in sorted(left_out)),
            judgements_table(judgements, None),
        ]
    )


def plot(rows, file):
    """Plot time over tokens, a panel for each group size, with the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(row["group_size"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(sizes), figsize=(5 * len(sizes), 4.5), squeeze=False, layout="constrained"
    )
    for axis, size in zip(axes[0], sizes, strict=True):
        panel = [row for row in rows if row["group_size"] == size]
        for color, name in enumerate(CONTENDERS):
            points = [
                (row["tokens"], 1e3 * row["seconds"][name]["median"])
                for row in panel
                if name in row["seconds"]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=f"C{color}", label=name)
        floor = [(row["tokens"], row["floor_milliseconds"]["ours"]) for row in panel]
        axis.plot(*zip(*floor, strict=True), "--", color="C0", label="floor")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=f"group {size}")
        axis.set_xscale("log", base=2)
        axis.legend(fontsize="x-small")
    figure.savefig(file, dpi=120)


def main(arguments=None):
    """Measure, print and write; return 1 if a bar is missed or ours is wrong anywhere."""
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    host = machine("cpu")
    speed, rows = host["copy_bytes_per_second"], []
    for group_size in options.group_sizes:
        layers = stack_of(options, group_size)
        for tokens in options.tokens:
            row = cell(layers, tokens, options)
            row["share_of_copy"] = shares(row, speed)
            row["floor_milliseconds"] = {k: 1e3 * v / speed for k, v in row["bytes"].items()}
            rows.append(row)
            say(f"g{group_size}, {tokens} tokens: {row['seconds']} {row['refused']}")
        del layers
    judgements = bars(rows)
    record = {
        "machine": host,
        "options": vars(options),
        "rows": rows,
        "bars": judgements,
        "not_judged": None,
    }
    tables = report(host, rows, judgements)
    code = finish(options.output, record, tables, functools.partial(plot, rows))
    return 1 if any("ours" in name for row in rows for name in row["refused"]) else code


if __name__ == "__main__":
    sys.exit(main())
