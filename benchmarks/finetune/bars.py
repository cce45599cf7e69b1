"""Compute the figures from the runs, and judge whether they reach the bars.

The bars have no tolerance. They apply to one model (hidden size 2048, 16 layers, of which steps and
forwards may be timed with 4), steps of 4 x 256 tokens, 5 or more interleaved rounds and 3 or more
fresh processes; other runs are not judged.

Source: ``benchmarks/results/README.md``.
"""

from benchmarks.finetune.accounting import LAYOUT
from benchmarks.finetune.contender import DENSE, OURS
from benchmarks.finetune.starts import CACHED, FRESH
from benchmarks.finetune.workloads import (
    FORWARD,
    GENERATE,
    GENERATE_ADAPTED,
    STEPS,
    TRAINING,
    Sizes,
)
from benchmarks.limits import Limit, judgement
from benchmarks.medians import medians, ratio

HIDDEN, LAYERS, TIMED_LAYERS, ROUNDS, STARTED = 2048, 16, 4, 5, 3
SIZES = Sizes(rows=4, length=256, prompt=16, new=64)
HELD, PEAK, FIRST_OVER_THIRD = Limit(most=LAYOUT), Limit(most=1.05), Limit(most=3)
SLOWER, FASTER, FASTER_ADAPTED = Limit(most=1.2), Limit(least=2.5), Limit(least=2)


def of_process(run):
    """Return the figures of a fresh process, as returned by ``starts``.

    Returns:
        ``load``, ``first``, ``second`` and ``third`` in seconds, ``first_over_third``, and in
        bytes: ``held`` of the model's tensors, ``load_peak`` and ``peak`` above the imports, the
        latter over all steps, ``last_peak`` of the last step, ``process`` in whole. A figure is
        None where the workload does not have it, and peaks where the system does not tell.
    """
    first, second, third = ([answer["seconds"] for answer in run["times"]] + [None])[:3]
    imports = run["imports"]["memory"]["now"]
    peaks = [answer.get("peak") for answer in run["times"]]
    known = None not in (imports, *peaks) and all(answer["resets"] for answer in run["times"])
    return {
        "load": run["load"]["seconds"],
        "first": first,
        "second": second,
        "third": third,
        "first_over_third": ratio(first, third),
        "held": run["load"]["held"],
        "imports": imports,
        "load_peak": None if imports is None else run["load"]["memory"]["peak"] - imports,
        "peak": max(peaks) - imports if known else None,
        "last_peak": peaks[-1] - imports if known else None,
        "process": max(peaks) if known else None,
    }


def of_starts(started):
    """Return the median and the spread of each figure, by contender, workload and state.

    Args:
        started: returned by ``starts``.
    """
    rounds = {}
    for run in started:
        key = run["contender"], run["workload"], run["state"]
        rounds.setdefault(key, []).append(of_process(run))
    return {key: medians(figures) for key, figures in rounds.items()}


def of_rounds(runs):
    """Return the median and the spread of each measure, by contender and workload.

    Args:
        runs: returned by ``Rounds.run``.
    """
    wanted = ("seconds", "forward", "backward", "update", "tokens_per_second")
    return {
        (run["contender"], run["workload"]): medians(
            [{name: answer.get(name) for name in wanted} for answer in run["rounds"]]
        )
        for run in runs
    }


def seconds_over(speeds, workload, over, under):
    """Return the ratio of two contenders' seconds for a workload; None if one was not measured.

    Args:
        speeds: returned by ``of_rounds``.
        workload: a step or ``generate``.
        over: the contender of the numerator.
        under: the contender of the denominator.
    """
    return ratio(*(_median(speeds.get((name, workload)), "seconds") for name in (over, under)))


def peak_over(started, under):
    """Return the peak of our training over another contender's; None if one was not measured.

    Args:
        started: returned by ``of_starts``.
        under: the other contender.
    """
    ours = _median(started.get((OURS, TRAINING, CACHED)), "peak")
    return ratio(ours, _median(started.get((under, TRAINING, FRESH)), "peak"))


def judged(started, runs, stored):
    """Return each bar with its value and whether it is reached, or None if it was not measured.

    Args:
        started: returned by ``starts``.
        runs: returned by ``Rounds.run``.
        stored: the bytes of the INT4 checkpoint.
    """
    figures, speeds = of_starts(started), of_rounds(runs)
    training = figures.get((OURS, TRAINING, CACHED))
    dense_peak = _median(figures.get((DENSE, TRAINING, FRESH)), "peak")
    held = _median(training, "held")
    rows = [
        (
            "weights held: the layout over the checkpoint's INT4 bytes",
            HELD,
            None if held is None else stored.layout_share(held),
        ),
        (
            "peak of training over (dense peak - bf16 weights + 1.12 x INT4 + a dense layer)",
            PEAK,
            None
            if dense_peak is None
            else ratio(_median(training, "peak"), stored.most_peak(dense_peak)),
        ),
        (
            "graphs cached on disk: the first forward over the third",
            FIRST_OVER_THIRD,
            _median(figures.get((OURS, FORWARD, CACHED)), "first_over_third"),
        ),
    ]
    rows += [
        (f"{workload}: ours over dense", SLOWER, seconds_over(speeds, workload, OURS, DENSE))
        for workload in STEPS
    ]
    rows += [
        (f"{workload}: tokens/s over dense", limit, seconds_over(speeds, workload, DENSE, OURS))
        for workload, limit in ((GENERATE, FASTER), (GENERATE_ADAPTED, FASTER_ADAPTED))
    ]
    return [judgement(*row) for row in rows]


def not_judged(options):
    """Return why a run is not judged, or None."""
    if (options.hidden, options.layers) != (HIDDEN, LAYERS) or options.timed_layers < TIMED_LAYERS:
        return f"they are for hidden {HIDDEN} with {LAYERS} layers, {TIMED_LAYERS} for times"
    if options.sizes != SIZES:
        return f"they are for steps of {SIZES.batch} and {SIZES.new} generated tokens"
    if options.rounds < ROUNDS or options.starts < STARTED:
        return f"they are for {ROUNDS} rounds or more and {STARTED} fresh processes or more"
    return None


def _median(figures, name):
    return None if figures is None or name not in figures else figures[name]["median"]


def losses(started):
    """Return the losses of the first steps of each contender, from its last fresh process.

    Args:
        started: returned by ``starts``.
    """
    return {
        run["contender"]: [answer["loss"] for answer in run["times"]]
        for run in started
        if run["workload"] == TRAINING
    }
