"""What was found as tables and a plot.

Source: ``benchmarks/results/README.md``.
"""

from benchmarks.machine import in_a_line
from benchmarks.serving.bars import judged, not_judged, ratios, summary
from benchmarks.serving.files import RANK
from benchmarks.serving.rounds import OURS, STOCK

MIB = 2**20
COLD = 1.5  # an unmeasured first run longer than this many medians is named
BUSY = 0.01  # of a processor, that an idle engine may use
MEASURES = {
    "tokens_per_second": ("tokens/s", 1, 1),
    "ttft": ("first token, ms", 1e3, 1),
    "itl": ("token to token, ms", 1e3, 2),
}


def report(found_on, found, engines, options):
    """Return everything in Markdown.

    Args:
        found_on: the machine.
        found: what ``Turns.run`` returned.
        engines: what is known of each engine, by name.
        options: the command's.
    """
    return "\n\n".join(
        [
            f"{in_a_line(found_on)}; a Llama of {options.layers} layers, hidden {options.hidden}, "
            f"INT4 in groups of 128, bfloat16, adapters of rank {RANK}; backend {options.backend}.",
            f"Medians of {options.rounds} rounds ± half the distance of the quartiles:",
            times_table(found),
            "Ratios of medians (time from token to token; whole time in a prefill and at 16 rows):",
            ratios_table(found),
            bars_table(found, engines, options),
            engines_table(engines),
            remarks(found, engines, options),
        ]
    )


def times_table(found):
    """Return what was measured of each workload on each engine."""
    head = ["workload", "adapters", "engine", *(title for title, _, _ in MEASURES.values())]
    rows = []
    for one in sorted(found, key=_place(found)):
        texts = []
        measured = summary(one)
        for name, (_, factor, digits) in MEASURES.items():
            texts.append(_with_spread(measured.get(name), factor, digits))
        rows.append([one["workload"].shape, one["workload"].mix, one["engine"], *texts])
    return _markdown(head, rows)


def ratios_table(found):
    """Return the ratios of each workload."""
    rows = ratios(found)
    names = ["ours: over base", "stock: over base", "stock over ours"]
    if any(row["before over ours"] is not None for row in rows):
        names.append("before over ours")
    texts = [
        [row["shape"], row["mix"], *(_number(row.get(name)) for name in names)] for row in rows
    ]
    return _markdown(["workload", "adapters", *names], texts)


def bars_table(found, engines, options):
    """Return the bars, and whether they are reached."""
    why = not_judged(options)
    rows = []
    for row in judged(found, engines):
        verdict = {True: "reached", False: "**missed**", None: "not measured"}[row["reached"]]
        if why is not None:
            verdict = "not judged"
        rows.append([row["bar"], row["limit"], _number(row["ratio"]), verdict])
    table = _markdown(["bar", "must be", "is", ""], rows)
    return table if why is None else f"The bars are not judged: {why}.\n\n{table}"


def engines_table(engines):
    """Return what each engine cost before and beside the requests."""
    head = ["engine", "load, s", "peak to load, MiB", "held then", "peak serving", "threads",
            "first request, ms", "tenth", "idle, % of a processor"]  # fmt: skip
    rows = []
    for name, one in engines.items():
        first, tenth = (1e3 * one["first_requests"][number] for number in (0, 9))
        sizes = [one["load_bytes"]["peak"], one["load_bytes"]["now"], one["serving_bytes"]["peak"]]
        idle = one["idle_share"]
        rows.append(
            [
                name,
                f"{one['load_seconds']:.0f}",
                *("-" if size is None else f"{size / MIB:.0f}" for size in sizes),
                str(one["threads"]),
                f"{first:.1f}",
                f"{tenth:.1f}",
                "-" if idle is None else f"{100 * idle:.2f}",
            ]
        )
    return _markdown(head, rows)


def remarks(found, engines, options):
    """Return what has to be known to read the tables, as a list in Markdown."""
    lines = [
        "memory: of the process; the KV cache is 1 GiB of it, unless VLLM_CPU_KVCACHE_SPACE says "
        "otherwise; the peak serving starts from what is held after loading",
        "first requests: 64 tokens and 8 more, one request at a time after loading, each with an "
        "adapter that is new to the engine",
        f"{options.max_loras} slots: 16 adapters "
        + (
            "have a slot each."
            if options.max_loras >= 16
            else f"share them; {options.max_loras} rows with different adapters run at once, the "
            "others wait, and each adapter is copied into a slot from memory when its turn comes."
        ),
    ]
    for name, one in engines.items():
        lines += [f"{name} said: {line}" for line in one["said"]]
        later = one["serving_bytes"]["graphs"] - one["load_graphs"]
        if later:
            lines.append(f"{name} compiled {later} graphs while it served")
        if not one["peak_starts_again"]:
            lines.append(f"{name}: its peak serving includes loading")
        if (one["idle_share"] or 0) > BUSY:
            lines.append(f"{name} was not idle while others ran: the times are of no use")
        cold = {one["workload"].name: cold_ratio(one) for one in found if one["engine"] == name}
        long = [f"{workload} ({ratio:.1f})" for workload, ratio in cold.items() if ratio > COLD]
        if long:
            lines.append(f"{name}: the first, unmeasured run over the median: {', '.join(long)}")
    same = ", ".join(f"{name} {share:.0%}" for name, share in agreement(found).items())
    if same:
        lines.append(f"first tokens that stock and ours have in common: {same}")
    return "\n".join(f"- {line}" for line in lines)


def cold_ratio(entry):
    """Return the unmeasured first run's time over the median."""
    return entry["cold"]["seconds"] / summary(entry)["seconds"]["median"]


def agreement(found):
    """Return the share of rows whose first token is the same from stock and ours, by workload.

    It tells a broken run, not a rounding: of random weights the two most likely tokens are close.
    """
    tokens = {(one["engine"], one["workload"].name): one["tokens"] for one in found}
    shares = {}
    for engine, name in tokens:
        if engine == OURS and (STOCK, name) in tokens:
            pairs = zip(tokens[OURS, name], tokens[STOCK, name], strict=True)
            same = [one[0] == other[0] for one, other in pairs]
            shares[name] = sum(same) / len(same)
    return shares


def plot(found, file):
    """Draw tokens a second, one panel a shape, a bar for each mix and engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(one["workload"].shape for one in found))
    names = list(dict.fromkeys(one["engine"] for one in found))
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(4 * len(shapes), 4), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        own = [one for one in found if one["workload"].shape == shape]
        mixes = list(dict.fromkeys(one["workload"].mix for one in own))
        for number, name in enumerate(names):
            for one in [one for one in own if one["engine"] == name]:
                place = mixes.index(one["workload"].mix) + 0.25 * number
                height = summary(one)["tokens_per_second"]["median"]
                axis.bar(place, height, width=0.23, color=f"C{number}")
        for number, name in enumerate(names):
            axis.bar(0, 0, color=f"C{number}", label=name)
        axis.set(title=shape, ylabel="tokens/s", xticks=[*range(len(mixes))])
        axis.set_xticklabels(mixes, rotation=30)
    axes[0][0].legend(fontsize="x-small")
    figure.savefig(file, dpi=120)


def _place(found):
    order = list(dict.fromkeys((one["workload"].shape, one["workload"].mix) for one in found))
    return lambda one: order.index((one["workload"].shape, one["workload"].mix))


def _with_spread(value, factor, digits):
    if value is None:
        return "-"
    spread = "" if value["spread"] is None else f" ±{100 * value['spread']:.0f} %"
    return f"{factor * value['median']:.{digits}f}{spread}"


def _number(value):
    return "-" if value is None else f"{value:.2f}"


def _markdown(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
