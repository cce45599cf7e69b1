"""Show the runs as tables and a plot.

Source: ``benchmarks/results/README.md``.
"""

from benchmarks.limits import judgements_table
from benchmarks.machine import in_a_line
from benchmarks.serving.bars import judged, not_judged, ratios, summary
from benchmarks.serving.files import RANK
from benchmarks.serving.rounds import OURS, STOCK
from benchmarks.tables import markdown, number, with_spread
from benchmarks.turns import BUSY

MIB = 2**20
COLD = 1.5  # a first run longer than this multiple of the median is named in the remarks
MEASURES = {
    "tokens_per_second": ("tokens/s", 1, 1),
    "ttft": ("first token, ms", 1e3, 1),
    "itl": ("token to token, ms", 1e3, 2),
}


def report(host, runs, engines, options):
    """Return all tables and remarks in Markdown.

    Args:
        host: the machine.
        runs: the runs that ``Turns.run`` returned.
        engines: the facts about each engine, by name.
        options: the command's options.
    """
    return "\n\n".join(
        [
            f"{in_a_line(host)}; a Llama of {options.layers} layers, hidden {options.hidden}, "
            f"INT4 in groups of 128, bfloat16, adapters of rank {RANK}; backend {options.backend}.",
            f"Medians of {options.rounds} rounds ± half the interquartile range:",
            times_table(runs),
            "Ratios of medians (time from token to token; whole time in a prefill and at 16 rows):",
            ratios_table(runs),
            bars_table(runs, engines, options),
            engines_table(engines),
            remarks(runs, engines, options),
        ]
    )


def times_table(runs):
    """Return the measures of each workload on each engine as a table."""
    head = ["workload", "adapters", "engine", *(title for title, _, _ in MEASURES.values())]
    rows = []
    for run in sorted(runs, key=_place(runs)):
        texts = []
        measured = summary(run)
        for name, (_, factor, digits) in MEASURES.items():
            texts.append(with_spread(measured.get(name), factor, digits))
        rows.append([run["workload"].shape, run["workload"].mix, run["engine"], *texts])
    return markdown(head, rows)


def ratios_table(runs):
    """Return the ratios of each workload as a table."""
    rows = ratios(runs)
    names = ["ours: over base", "stock: over base", "stock over ours"]
    if any(row["before over ours"] is not None for row in rows):
        names.append("before over ours")
    texts = [[row["shape"], row["mix"], *(number(row.get(name)) for name in names)] for row in rows]
    return markdown(["workload", "adapters", *names], texts)


def bars_table(runs, engines, options):
    """Return the bars and whether they are reached, as a table."""
    return judgements_table(judged(runs, engines), not_judged(options))


def engines_table(engines):
    """Return each engine's time to load, memory and idle time as a table."""
    head = ["engine", "load, s", "again", "peak to load, MiB", "held then", "peak serving",
            "threads", "first request, ms", "tenth", "first of the cold start", "tenth",
            "idle, % of a processor"]  # fmt: skip
    rows = []
    for name, facts in engines.items():
        starts = facts, facts["cold"]
        first = [1e3 * start["first_requests"][number] for start in starts for number in (0, 9)]
        loaded, served = facts["load_bytes"], facts["serving_bytes"]
        sizes = [loaded["peak"], loaded["now"], served["peak"]]
        idle = facts["idle_share"]
        rows.append(
            [
                name,
                f"{facts['cold']['load_seconds']:.1f}",
                f"{facts['load_seconds']:.1f}",
                *("-" if size is None else f"{size / MIB:.0f}" for size in sizes),
                str(facts["threads"]),
                *(f"{milliseconds:.1f}" for milliseconds in first),
                "-" if idle is None else f"{100 * idle:.2f}",
            ]
        )
    return markdown(head, rows)


def remarks(runs, engines, options):
    """Return remarks on the tables, as a list in Markdown."""
    lines = [
        "memory: of the process; the KV cache is 1 GiB of it, unless VLLM_CPU_KVCACHE_SPACE is "
        "set; the peak serving starts from what is held after loading",
        "load: the first start has nothing on the disk but the model; the second has the times and "
        "graphs of the first, and is the engine that is measured",
        "first requests: 64 tokens and 8 more, one request at a time after loading, each with an "
        "adapter that is new to the engine",
        f"{options.max_loras} slots: 16 adapters "
        + (
            "have a slot each."
            if options.max_loras >= 16
            else f"share them; {options.max_loras} rows with different adapters run at once, the "
            "others wait, and each adapter is copied into a slot from memory when its turn comes. "
            "So their time is held against as many rows at a time without adapters."
        ),
    ]
    for name, facts in engines.items():
        lines += [f"{name} logged: {line}" for line in facts["log"]]
        later = facts["serving_bytes"]["graphs"] - facts["load_graphs"]
        if later:
            lines.append(f"{name} compiled {later} graphs while it served")
        if not facts["peak_starts_again"]:
            lines.append(f"{name}: its peak serving includes loading")
        if (facts["idle_share"] or 0) > BUSY:
            lines.append(f"{name} was not idle while others ran: the times are not valid")
        cold = {run["workload"].name: cold_ratio(run) for run in runs if run["engine"] == name}
        long = [f"{workload} ({ratio:.1f})" for workload, ratio in cold.items() if ratio > COLD]
        if long:
            lines.append(f"{name}: the first, unmeasured run over the median: {', '.join(long)}")
    same = ", ".join(f"{name} {share:.0%}" for name, share in agreement(runs).items())
    if same:
        lines.append(f"first tokens that stock and ours have in common: {same}")
    return "\n".join(f"- {line}" for line in lines)


def cold_ratio(run):
    """Return the ratio of the unmeasured first run's time to the median."""
    return run["cold"]["seconds"] / summary(run)["seconds"]["median"]


def agreement(runs):
    """Return, by workload, the share of rows whose first token is the same from stock and ours.

    A low share shows a broken run. It cannot judge roundings, because with random weights the two
    most likely tokens are close.
    """
    tokens = {(run["engine"], run["workload"].name): run["tokens"] for run in runs}
    shares = {}
    for engine, name in tokens:
        if engine == OURS and (STOCK, name) in tokens:
            pairs = zip(tokens[OURS, name], tokens[STOCK, name], strict=True)
            same = [ours[0] == stock[0] for ours, stock in pairs]
            shares[name] = sum(same) / len(same)
    return shares


def plot(runs, file):
    """Plot tokens per second: a panel for each shape, a bar for each mix and engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(run["workload"].shape for run in runs))
    names = list(dict.fromkeys(run["engine"] for run in runs))
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(4 * len(shapes), 4), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        panel = [run for run in runs if run["workload"].shape == shape]
        mixes = list(dict.fromkeys(run["workload"].mix for run in panel))
        for at, name in enumerate(names):
            for run in [run for run in panel if run["engine"] == name]:
                place = mixes.index(run["workload"].mix) + 0.25 * at
                height = summary(run)["tokens_per_second"]["median"]
                axis.bar(place, height, width=0.23, color=f"C{at}")
        for at, name in enumerate(names):
            axis.bar(0, 0, color=f"C{at}", label=name)
        axis.set(title=shape, ylabel="tokens/s", xticks=[*range(len(mixes))])
        axis.set_xticklabels(mixes, rotation=30)
    axes[0][0].legend(fontsize="x-small")
    figure.savefig(file, dpi=120)


def _place(runs):
    order = list(dict.fromkeys((run["workload"].shape, run["workload"].mix) for run in runs))
    return lambda run: order.index((run["workload"].shape, run["workload"].mix))
