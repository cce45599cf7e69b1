"""Measure how a layer's cost grows, with its floor: ``python -m benchmarks.growth``.

Tokens, adapters, rank and width grow one at a time. Print the table; ``--output NAME`` writes
``results/NAME.json``, ``.md`` and ``.png``, one panel for each. The floor is the larger of two
times: the bytes that must be moved over the bandwidth of a copy, and the operations over the rate
of the dense layer with many tokens. Both rates are measured in the same run.

Source: ``benchmarks/results/README.md``.
"""

import argparse
import dataclasses
import functools
import os
import sys
from dataclasses import dataclass

import torch

from benchmarks.cell import described, mode_of, timed
from benchmarks.command import finish, say
from benchmarks.contenders import our_layers
from benchmarks.machine import chosen_device, in_a_line, machine
from benchmarks.operands import ADAPTERS, RANK, Layer
from benchmarks.report import rates
from benchmarks.tables import markdown

GROWN = {
    "tokens": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    "adapters": (1, 2, 4, 8, 16, 32, 64),
    "rank": (8, 16, 32, 64, 128, 256),
    "width": (2048, 4096, 8192, 16384),
}
MANY_TOKENS = 2048  # at which the dense layer is measured where tokens do not grow
FLOORS = {"ours": "floor", "ours + LoRA": "floor + LoRA"}


@dataclass(frozen=True)
class Point:
    """The sizes of a layer of as many outputs as inputs.

    Args:
        tokens: rows of x; where adapters grow, each has a token.
        adapters: the number of adapters.
        rank: their rank.
        width: out_features and in_features.
    """

    tokens: int = 16
    adapters: int = ADAPTERS
    rank: int = RANK
    width: int = 4096

    def operands(self, options):
        """Return the layer's operands."""
        dtype = getattr(torch, options.dtype)
        sizes = (self.width, self.width, self.tokens, dtype, options.group_size, options.device)
        return Layer(*sizes, adapters=self.adapters, rank=self.rank)


def fixed(grown, options):
    """Return the point of which one size grows."""
    tokens = max(options.adapters, default=1) if grown == "adapters" else Point.tokens
    return Point(tokens, width=options.fixed_width)


def options_of(arguments):
    """Return the checked options, with defaults filled in."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--output", help="write results/OUTPUT.json, .md and .png")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    for grown, sizes in GROWN.items():
        parser.add_argument(
            f"--{grown}", type=int, nargs="*", default=list(sizes), help=f"({sizes[0]} ...)"
        )
    parser.add_argument("--fixed-width", type=int, default=Point.width, help="(%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of x (%(default)s)")
    parser.add_argument("--group-size", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="the most rounds (%(default)s)")
    parser.add_argument("--budget", type=float, default=5, help="seconds for a point (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds: 2 or more, got {options.rounds}")
    options.device = chosen_device(parser, options.device)
    return options


@torch.inference_mode()
def measured(point, options, copy_bytes_per_second):
    """Return the row of one point, without its floors."""
    layer = point.operands(options)
    offered, mode = our_layers(layer), mode_of(options.device, in_a_graph=False)
    times = timed(layer, offered, mode, options)
    row = described(layer, mode, times, offered)
    row["operations"] = {
        contender.name: layer.operations(lora=contender.lora) for contender in offered
    }
    return {**row, **rates(row, copy_bytes_per_second), "refused": times.refused}


def dense_rate(rows):
    """Return the most operations per second of the dense layer in any row, or None."""
    return max(
        (
            row["operations"]["dense"] / (1e-3 * row["milliseconds"]["dense"])
            for row in rows
            if "dense" in row["milliseconds"]
        ),
        default=None,
    )


def floors(row, copy_bytes_per_second, operations_per_second):
    """Return the floors of a row's times in milliseconds, by the contender's name."""
    return {
        name: 1e3
        * max(
            row["bytes"][name] / copy_bytes_per_second,
            row["operations"][name] / operations_per_second,
        )
        for name in FLOORS
        if name in row["bytes"]
    }


def run(options, host):
    """Return the rows, with their floors, and the rate of the dense layer."""
    bandwidth, rows = host["copy_bytes_per_second"], []
    for grown in GROWN:
        start = fixed(grown, options)
        for size in getattr(options, grown):
            point = dataclasses.replace(start, **{grown: size})
            rows.append({"grown": grown, "size": size, **measured(point, options, bandwidth)})
            say(f"{grown} {size}: {rows[-1]['milliseconds']}")
    many = Point(MANY_TOKENS, width=options.fixed_width)
    apart = [] if options.tokens else [measured(many, options, bandwidth)]
    rate = dense_rate([*rows, *apart])
    for row in rows:
        row["floor_milliseconds"] = floors(row, bandwidth, rate)
    return rows, rate


def report(host, rows, rate):
    """Return the table and the two rates in Markdown."""
    head = ["grows", "M", "adapters", "rank", "width", "dense", *FLOORS, *FLOORS.values()]
    head += [f"{name} / floor" for name in FLOORS]
    lines = []
    for row in rows:
        times, least = row["milliseconds"], row["floor_milliseconds"]
        sizes = [row[name] for name in ("grown", "tokens", "adapters", "rank", "columns")]
        values = [times.get(name) for name in ("dense", *FLOORS)]
        values += [least.get(name) for name in FLOORS]
        values += [times[name] / least[name] if name in times else None for name in FLOORS]
        texts = ["-" if value is None else f"{value:.3g}" for value in values]
        lines.append([str(size) for size in sizes] + texts)
    left_out = {why: name for row in rows for name, why in row["refused"].items()}
    return "\n\n".join(
        [
            f"{in_a_line(host)}. Medians in milliseconds. The floor: bytes at "
            f"{1e-9 * host['copy_bytes_per_second']:.3g} GB/s of a copy, operations at "
            f"{1e-12 * rate:.3g} TFLOP/s of the dense layer.",
            markdown(head, lines),
            *(f"- not measured: {name}: {why}" for why, name in left_out.items()),
        ]
    )


def plot(rows, file):
    """Plot time over each size that grows, with the floors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grown = list(dict.fromkeys(row["grown"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(grown), figsize=(5 * len(grown), 4.5), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], grown, strict=True):
        panel = [row for row in rows if row["grown"] == name]
        for color, contender in enumerate(("ours", "ours + LoRA", "dense")):
            for times, style in (("milliseconds", "o-"), ("floor_milliseconds", "--")):
                points = [
                    (row["size"], row[times][contender]) for row in panel if contender in row[times]
                ]
                label = contender if style == "o-" else FLOORS.get(contender)
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=f"C{color}", label=label)
        first = panel[0]
        sizes = {"tokens": first["tokens"], "adapters": first["adapters"]}
        sizes |= {"rank": first["rank"], "width": first["columns"]}
        kept = [f"{size} {value}" for size, value in sizes.items() if size != name]
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel="ms", title=", ".join(kept))
        axis.set_xscale("log", base=2)
        axis.legend(fontsize="x-small")
    figure.savefig(file, dpi=120)


def main(arguments=None):
    """Measure, print and write; return 1 if our layer failed anywhere."""
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    host = machine(options.device)
    rows, rate = run(options, host)
    record = {
        "machine": host,
        "options": vars(options),
        "dense_operations_per_second": rate,
        "rows": rows,
        "bars": [],
        "not_judged": None,
    }
    finish(options.output, record, report(host, rows, rate), functools.partial(plot, rows))
    return 1 if any(name in row["refused"] for row in rows for name in FLOORS) else 0


if __name__ == "__main__":
    sys.exit(main())
