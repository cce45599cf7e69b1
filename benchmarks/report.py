"""Show the measured rows as ratios, tables and a plot.

Source: ``benchmarks/results/README.md`` for the bars.
"""

from benchmarks.medians import ratio
from benchmarks.tables import markdown, number

MARGIN = {"cpu": 0.1, "cuda": 0.05}  # the fraction of time that adapters may add beyond their share


def bars(cell):
    """Return the ratios that have bars; None where a side of the ratio was not measured."""
    times = cell["milliseconds"]
    ours, with_lora = times.get("ours"), times.get("ours + LoRA")
    both = None not in (ours, with_lora)
    ratios = {
        "ours / best INT4 peer": ratio(ours, _best(times, cell["peers"])),
        "ours + LoRA / best peer + LoRA": ratio(with_lora, _best(times, cell["lora_peers"])),
        "ours / dense": ratio(ours, times.get("dense")),
        "LoRA adds": with_lora / ours - 1 if both else None,
        "LoRA adds us": 1e3 * (with_lora - ours) if both else None,
        "LoRA may add": cell["lora_share"] + MARGIN[cell["device"]],
    }
    slowed = slowdowns(cell)
    for name in ("ours", "ours + LoRA") if slowed else ():
        ratios[f"slowed: {name} / dense"] = ratio(slowed.get(name), slowed.get("dense"))
    return ratios


def slowdowns(cell):
    """Return each contender's time beside busy processes over its quiet time, by name."""
    quiet = cell["milliseconds"]
    beside = cell.get("beside_milliseconds", {})
    return {name: milliseconds / quiet[name] for name, milliseconds in beside.items()}


def rates(cell, copy_bytes_per_second):
    """Return each contender's bytes per second, and the share of a copy's bandwidth."""
    achieved = {
        name: cell["bytes"][name] / (1e-3 * milliseconds)
        for name, milliseconds in cell["milliseconds"].items()
    }
    return {
        "gigabytes_per_second": {name: 1e-9 * rate for name, rate in achieved.items()},
        "share_of_copy": {name: rate / copy_bytes_per_second for name, rate in achieved.items()},
    }


def table(cells):
    """Return times and ratios as a table in Markdown."""
    rows = []
    for cell in cells:
        times = {
            name: f"{milliseconds:.{_digits(milliseconds)}f} ±{100 * cell['spread'][name]:.0f} %"
            for name, milliseconds in cell["milliseconds"].items()
        }
        ratios = {name: number(value) for name, value in bars(cell).items()}
        rows.append((cell, {**times, **ratios}))
    return _markdown(rows, [*_names(cells), *bars(cells[0])])


def rates_table(cells):
    """Return GB/s and the share of a copy's bandwidth as a table in Markdown."""
    rows = [
        (
            cell,
            {
                name: f"{rate:.3g} ({100 * cell['share_of_copy'][name]:.0f} %)"
                for name, rate in cell["gigabytes_per_second"].items()
            },
        )
        for cell in cells
    ]
    return _markdown(rows, _names(cells))


def slowdowns_table(cells):
    """Return how much slower each contender is beside busy processes, as a table in Markdown."""
    rows = [
        (cell, {name: number(slower) for name, slower in slowdowns(cell).items()}) for cell in cells
    ]
    return _markdown(rows, list(dict.fromkeys(name for _, texts in rows for name in texts)))


def remarks(cells):
    """Return which contenders were not measured and why, as a list in Markdown."""
    left_out = {}
    for cell in cells:
        for name, why in cell["refused"].items():
            counts = left_out.setdefault(why, {})
            counts[name] = counts.get(name, 0) + 1
    lines = []
    for why, counts in left_out.items():
        names = [f"{name} ({count} of {len(cells)} rows)" for name, count in counts.items()]
        lines.append(f"- not measured: {', '.join(names)}: {why}")
    return "\n".join(lines)


def report(cells):
    """Return the tables and remarks in Markdown."""
    parts = [
        "Milliseconds, median ± half the interquartile range:",
        table(cells),
        "GB/s of the bytes that must be moved, and their share of a copy's bandwidth:",
        rates_table(cells),
    ]
    if any(slowdowns(cell) for cell in cells):
        parts += ["Time beside busy processes over quiet time:", slowdowns_table(cells)]
    return "\n\n".join([*parts, remarks(cells)]).rstrip()


def plot(cells, file):
    """Plot time over tokens, with one panel for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((cell["rows"], cell["columns"], cell["dtype"]) for cell in cells))
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(6 * len(shapes), 4.5), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        panel = [cell for cell in cells if (cell["rows"], cell["columns"], cell["dtype"]) == shape]
        for name in _names(panel):
            points = [
                (cell["tokens"], cell["milliseconds"][name])
                for cell in panel if name in cell["milliseconds"]
            ]  # fmt: skip
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=str(shape))
        axis.legend(fontsize="x-small")
    figure.savefig(file, dpi=120)


def _markdown(rows, columns):
    lines = []
    for cell, texts in rows:
        weight = f"{cell['rows']} x {cell['columns']}"
        row = [weight, cell["format"], cell["dtype"], str(cell["tokens"])]
        lines.append(row + [texts.get(name, "-") for name in columns])
    return markdown(["shape", "W", "x", "M", *columns], lines)


def _names(cells):
    return list(dict.fromkeys(name for cell in cells for name in cell["milliseconds"]))


def _digits(milliseconds):
    return 3 if milliseconds >= 0.1 else 5


def _best(times, names):
    return min((times[name] for name in names if name in times), default=None)
