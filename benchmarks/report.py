"""What was measured as bars, tables and a plot.

Source: the bars are those of ``benchmarks/results/README.md``.
"""

MARGIN = {"cpu": 0.1, "cuda": 0.05}  # that adapters may add beyond their share


def bars(found):
    """Return the ratios that the bars are about; None where one side was not measured."""
    times = found["milliseconds"]
    ours, with_lora = times.get("ours"), times.get("ours + LoRA")
    both = None not in (ours, with_lora)
    return {
        "ours / best INT4 peer": _ratio(ours, _best(times, found["peers"])),
        "ours + LoRA / best peer + LoRA": _ratio(with_lora, _best(times, found["lora_peers"])),
        "ours / dense": _ratio(ours, times.get("dense")),
        "LoRA adds": with_lora / ours - 1 if both else None,
        "LoRA adds us": 1e3 * (with_lora - ours) if both else None,
        "LoRA may add": found["lora_share"] + MARGIN[found["device"]],
    }


def rates(found, copy_bytes_per_second):
    """Return bytes a second of each contender, and its share of what a copy reaches, by name."""
    achieved = {
        name: found["bytes"][name] / (1e-3 * milliseconds)
        for name, milliseconds in found["milliseconds"].items()
    }
    return {
        "gigabytes_per_second": {name: 1e-9 * rate for name, rate in achieved.items()},
        "share_of_copy": {name: rate / copy_bytes_per_second for name, rate in achieved.items()},
    }


def table(cells):
    """Return times and bars as a table in Markdown."""
    rows = []
    for one in cells:
        times = {
            name: f"{milliseconds:.{_digits(milliseconds)}f} ±{100 * one['spread'][name]:.0f} %"
            for name, milliseconds in one["milliseconds"].items()
        }
        ratios = {
            name: "-" if ratio is None else f"{ratio:.2f}" for name, ratio in bars(one).items()
        }
        rows.append((one, {**times, **ratios}))
    return _markdown(rows, [*_names(cells), *bars(cells[0])])


def rates_table(cells):
    """Return achieved GB/s, and the share of a copy's, as a table in Markdown."""
    rows = [
        (
            one,
            {
                name: f"{rate:.3g} ({100 * one['share_of_copy'][name]:.0f} %)"
                for name, rate in one["gigabytes_per_second"].items()
            },
        )
        for one in cells
    ]
    return _markdown(rows, _names(cells))


def remarks(cells):
    """Return who was not measured and why, as a list in Markdown."""
    left_out = {}
    for one in cells:
        for name, why in one["refused"].items():
            counts = left_out.setdefault(why, {})
            counts[name] = counts.get(name, 0) + 1
    lines = []
    for why, counts in left_out.items():
        names = [f"{name} ({count} of {len(cells)} rows)" for name, count in counts.items()]
        lines.append(f"- not measured: {', '.join(names)}: {why}")
    return "\n".join(lines)


def report(cells):
    """Return everything in Markdown."""
    return "\n\n".join(
        [
            "Milliseconds, median ± half the distance of the quartiles:",
            table(cells),
            "GB/s of the bytes that cannot be avoided, and their share of what a copy reaches:",
            rates_table(cells),
            remarks(cells),
        ]
    ).rstrip()


def plot(cells, file):
    """Draw time over tokens, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((one["rows"], one["columns"], one["dtype"]) for one in cells))
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(6 * len(shapes), 4.5), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        own = [one for one in cells if (one["rows"], one["columns"], one["dtype"]) == shape]
        for name in _names(own):
            points = [
                (one["tokens"], one["milliseconds"][name])
                for one in own if name in one["milliseconds"]
            ]  # fmt: skip
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=str(shape))
        axis.legend(fontsize="x-small")
    figure.savefig(file, dpi=120)


def _markdown(rows, columns):
    head = ["shape", "x", "M", *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one, texts in rows:
        row = [f"{one['rows']} x {one['columns']}", one["dtype"], str(one["tokens"])]
        lines.append("| " + " | ".join(row + [texts.get(name, "-") for name in columns]) + " |")
    return "\n".join(lines)


def _names(cells):
    return list(dict.fromkeys(name for one in cells for name in one["milliseconds"]))


def _digits(milliseconds):
    return 3 if milliseconds >= 0.1 else 5


def _best(times, names):
    return min((times[name] for name in names if name in times), default=None)


def _ratio(one, other):
    return None if None in (one, other) else one / other
