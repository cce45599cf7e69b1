"""Show the runs as tables and a plot.

Source: ``benchmarks/results/README.md``.
"""

from benchmarks.finetune.bars import (
    judged,
    losses,
    not_judged,
    of_rounds,
    of_starts,
    peak_over,
    seconds_over,
)
from benchmarks.finetune.contender import CONTENDERS, DECOMPRESSED, DENSE, OURS, RANK
from benchmarks.finetune.starts import MAPPED
from benchmarks.finetune.workloads import FORWARD, FORWARD_1, GENERATES, STEPS, TIMES, TRAINING
from benchmarks.limits import judgements_table
from benchmarks.machine import in_a_line
from benchmarks.tables import markdown, number, with_spread
from benchmarks.turns import BUSY

MIB = 2**20
MEMORY = {  # the columns of the table of memory, in MiB
    "held": "tensors held",
    "load_peak": "peak of the load",
    "peak": "peak of training",
    "last_peak": "of its last step",
    "imports": "imports",
    "process": "whole process, training",
}
PAIRS = ((OURS, DENSE), (OURS, DECOMPRESSED), (DECOMPRESSED, DENSE))


def report(record, options):
    """Return all tables and remarks in Markdown.

    Args:
        record: the result, as ``__main__`` makes it.
        options: the command's options.
    """
    started, runs = record["starts"], record["rounds"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    sizes = options.sizes
    parts = [
        f"{in_a_line(record['machine'])}, {versions}; a Llama of hidden {options.hidden} with "
        f"{options.layers} layers for memory and `generate`, {options.timed_layers} for the times "
        "of steps and forwards; INT4 in groups of 128, bfloat16, a tied embedding; an adapter of "
        f"rank {RANK} on all linear layers, in float32 as PEFT makes it; steps of {sizes.batch}.",
        judgements_table(judged(started, runs, options.stored), not_judged(options)),
    ]
    if runs:
        parts += [
            f"Seconds, medians of {options.rounds} rounds ± half the interquartile range; "
            f"`generate` makes {sizes.new} tokens for a prompt of {sizes.prompt}:",
            speeds_table(runs),
            "Ratios of medians of seconds:",
            ratios_table(runs),
        ]
    if started:
        parts += [
            "Memory of training in MiB, of fresh processes, above what the imports take:",
            memory_table(started),
            "Seconds of fresh processes:",
            starts_table(started),
        ]
    return "\n\n".join([*parts, remarks(record, options)])


def speeds_table(runs):
    """Return the measures of each workload and contender as a table."""
    speeds = of_rounds(runs)
    rows = []
    for workload in (*STEPS, *GENERATES):
        for name in CONTENDERS:
            if (name, workload) in speeds:
                measures = speeds[name, workload]
                texts = [
                    with_spread(measures.get(key), 1, 3)
                    for key in ("seconds", "forward", "backward", "update")
                ]
                rate = with_spread(measures.get("tokens_per_second"), 1, 1)
                rows.append([workload, name, *texts, rate])
    return markdown(
        ["workload", "contender", "s", "forward", "backward", "update", "tokens/s"], rows
    )


def ratios_table(runs):
    """Return the ratios of the contenders' seconds as a table."""
    speeds = of_rounds(runs)
    rows = [
        [workload, *(number(seconds_over(speeds, workload, *pair)) for pair in PAIRS)]
        for workload in (*STEPS, *GENERATES)
    ]
    return markdown(["workload", *(f"{over} over {under}" for over, under in PAIRS)], rows)


def memory_table(started):
    """Return the memory of each contender as a table."""
    rows = []
    for (name, workload, state), figures in sorted(of_starts(started).items()):
        if workload == TRAINING:
            texts = [with_spread(figures.get(key), 1 / MIB, 0) for key in MEMORY]
            rows.append([name, state, *texts])
    return markdown(["contender", "", *MEMORY.values()], rows)


def starts_table(started):
    """Return the seconds to load, and of the first forwards or steps, as a table."""
    rows = []
    figures = of_starts(started)
    for workload in (FORWARD, FORWARD_1):
        for name, _, state in sorted(key for key in figures if key[1] == workload):
            measures = figures[name, workload, state]
            texts = [
                with_spread(measures[key], 1, 3) for key in ("load", "first", "second", "third")
            ]
            over = with_spread(measures["first_over_third"], 1, 2)
            rows.append([workload, name, state, *texts, over])
    head = ["", "contender", "", "load", "first", "second", "third", "first over third"]
    return markdown(head, rows)


def remarks(record, options):
    """Return remarks on the tables, as a list in Markdown."""
    started, stored = record["starts"], options.stored
    lines = [
        f"the INT4 checkpoint: {stored.int4 / MIB:.0f} MiB of INT4 and {stored.dense / MIB:.0f} "
        f"MiB dense; in bfloat16 the quantised weights take {stored.as_bf16 / MIB:.0f} MiB, the "
        f"largest layer {stored.layer_as_bf16 / MIB:.0f} MiB",
    ]
    if started:
        lines += [
            f"fresh processes: each runs {TIMES[FORWARD]} forwards or {TIMES[TRAINING]} steps with "
            "gradient checkpointing; peaks include the files that are mapped into memory, and "
            "no freed memory, which malloc returns at once "
            f"({', '.join(f'{name}={value}' for name, value in MAPPED.items())}); "
            f"processes that train ran once, the others {options.starts} times",
            f"{DECOMPRESSED} trains only after a forward has made it dense, which is part of no "
            "step; its fresh processes ran once",
            "losses of the first steps: "
            + "; ".join(
                f"{name} {', '.join(f'{loss:.4f}' for loss in values)}"
                for name, values in losses(started).items()
            ),
        ]
        peak = peak_over(of_starts(started), DENSE)
        if peak is not None:
            lines.append(f"peak of training, {OURS} over {DENSE}: {peak:.2f}")
    for name, share in record["idle_shares"].items():
        if (share or 0) > BUSY:
            lines.append(f"{name} was not idle while others ran: the times are not valid")
    for run in record["rounds"]:
        late = sum(answer["graphs"] for answer in run["rounds"])
        if late:
            lines.append(
                f"{run['contender']} compiled {late} graphs in measured rounds of {run['workload']}"
            )
    return "\n".join(f"- {line}" for line in lines)


def plot(record, file):
    """Plot the seconds of a step, tokens per second of ``generate``, and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    speeds, figures = of_rounds(record["rounds"]), of_starts(record["starts"])
    panels, axes = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axis, workloads, title in (
        (axes[0], STEPS, "a training step, s"),
        (axes[1], GENERATES, "generate, tokens/s"),
    ):
        measure = "seconds" if workloads is STEPS else "tokens_per_second"
        _bars(axis, workloads, title, lambda key, measure=measure: speeds.get(key, {}).get(measure))
    by_contender = {}
    for (name, workload, _), measures in figures.items():
        if workload == TRAINING:
            by_contender |= {(name, key): measures.get(key) for key in ("held", "peak")}
    in_mib = {
        key: None if value is None else {"median": value["median"] / MIB}
        for key, value in by_contender.items()
    }
    _bars(axes[2], ("held", "peak"), "memory of training, MiB", in_mib.get)
    axes[0].legend(fontsize="small")
    panels.savefig(file, dpi=120)


def _bars(axis, groups, title, measure):
    """Draw a bar for each group and contender; ``measure`` returns a median or None."""
    for place, name in enumerate(CONTENDERS):
        medians = [measure((name, group)) for group in groups]
        heights = [0 if median is None else median["median"] for median in medians]
        axis.bar([at + 0.28 * place for at in range(len(groups))], heights, 0.26, label=name)
    axis.set(title=title, xticks=[at + 0.28 for at in range(len(groups))])
    axis.set_xticklabels(groups)
