"""Format the measured table in Markdown, with the target figures in its last column.

Source: ``benchmarks/results/README.md``.
"""

import statistics

from benchmarks.machine import in_a_line
from benchmarks.seed_table.shapes import DENSE, INT4, LORA

SAID = {DENSE: "14 GB, 1.0 x", INT4: "3.5 GB, 2.4 x", LORA: "5.25 GB, 1.9 x"}
NAMES = {"float16": "FP16", "bfloat16": "BF16"}


def seconds_a_token(times, model, layers):
    """Return the median time of a token through all layers, and its spread.

    The spread is half the interquartile range, relative to the median.

    Args:
        times: the seconds of each round for one kind of weights, in ``layers`` and ``head``.
        model: the model's sizes.
        layers: the number of measured layers; their time is scaled to all layers of the model.
    """
    pairs = zip(times["layers"], times["head"], strict=True)
    tokens = [model.layers / layers * through_layers + head for through_layers, head in pairs]
    middle = statistics.median(tokens)
    low, _, high = statistics.quantiles(tokens, n=4)
    return middle, (high - low) / 2 / middle


def rows(measurements, model, layers):
    """Return the table's rows as numbers, by kind."""
    times = {kind: seconds_a_token(kept, model, layers) for kind, kept in measurements.items()}
    return {
        kind: {
            "weight_bytes": model.whole_bytes(kind),
            "adapter_bytes": model.layers * model.layer_bytes(kind)[1],
            "held_bytes": model.layers * kept["layer_bytes"] + model.outside_bytes,
            "making_bytes": kept["making"],
            "peak_bytes": kept["peak"],
            "tokens_per_second": 1 / times[kind][0],
            "spread": times[kind][1],
            "over_dense": times[DENSE][0] / times[kind][0],
        }
        for kind, kept in measurements.items()
    }


def report(host, measurements, model, layers, dtype):
    """Return the table and remarks on it, in Markdown.

    Args:
        host: the machine.
        measurements: the measurements of each kind of weights.
        model: the model's sizes.
        layers: the number of measured layers.
        dtype: the dtype of x, scales and dense weights.
    """
    part = f"{layers} of {model.layers} layers"
    peaks = [f"peak decoding, {part}, GB", f"peak making, {part}, GB"]
    head = ["", "weights, GB", "as held, GB", *peaks, "tokens/s", "over the first"]
    head.append("expected")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    table = rows(measurements, model, layers)
    for kind, row in table.items():
        name = NAMES[dtype] if kind == DENSE else kind
        name = f"{name} r = {model.rank}" if kind == LORA else name
        sizes = [row["weight_bytes"], row["held_bytes"], row["peak_bytes"], row["making_bytes"]]
        texts = ["-" if size is None else f"{1e-9 * size:.2f}" for size in sizes]
        rate = f"{row['tokens_per_second']:.2f} ±{100 * row['spread']:.0f} %"
        cells = [name, *texts, rate, f"{row['over_dense']:.2f} x", SAID[kind]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(
        [f"{in_a_line(host)}:", "", *lines, "", *_remarks(measurements, table, model, layers)]
    )


def _remarks(measurements, table, model, layers):
    base, lora = table[INT4], table[LORA]
    added = base["tokens_per_second"] / lora["tokens_per_second"] - 1
    scaled = f", {layers} measured and scaled to {model.layers}" if layers < model.layers else ""
    return [
        f"- {model.layers} layers of {model.hidden} and {model.intermediate}{scaled}; group "
        f"{model.group_size}; random weights; embedding and lm_head, {model.vocabulary} rows each, "
        "have 16 bits.",
        "- tokens/s: one row through every linear layer and lm_head; attention and norms are left "
        "out. On a CPU each layer is a call from Python, on a GPU all of them are a CUDA graph.",
        f"- the adapter: {1e-6 * lora['adapter_bytes']:.0f} MB, "
        f"{100 * lora['adapter_bytes'] / base['weight_bytes']:.1f} % of the INT4 weights; it adds "
        f"{100 * added:.1f} % of time (expected: less than 5 %).",
        f"- peaks: of {measurements[INT4]['of']}, one process for each row of the table, which had "
        f"{1e-9 * (measurements[INT4]['bytes_before'] or 0):.2f} GB before there were weights; "
        "making includes compiling.",
    ]
