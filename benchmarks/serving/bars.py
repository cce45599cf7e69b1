"""Compute ratios of medians, and judge whether they reach the bars.

The bars have no tolerance. They apply to one model (hidden size 2048, 4 adapters) and 5 or more
interleaved rounds; other runs are not judged.

Source: ``benchmarks/results/README.md``.
"""

import re
from dataclasses import dataclass

from benchmarks.limits import Limit, judgement
from benchmarks.medians import medians, ratio
from benchmarks.serving.files import adapters_share
from benchmarks.serving.rounds import BEFORE, OURS, STOCK

PREFILL, PREFILL_16 = "prefill, 8 x 64", "prefill, 16 x 32"
DECODE_1, DECODE_8, DECODE_16 = "decode, 1 row", "decode, 8 rows", "decode, 16 rows"
HIDDEN, LAYERS, MAX_LORAS, ROUNDS = 2048, range(4, 9), 4, 5
POINTS = 0.10  # that adapters may add to a prefill, beside their share of the operations
FIRST_OVER_TENTH = 1.3
WARM, COLD = 8.0, 60.0  # seconds that a start may take longer than stock's
LEAST_FUSED = 0.9  # of the linear layers
STARTS = {"cold": lambda facts: facts.get("cold", {}), "warm": lambda facts: facts}


@dataclass(frozen=True)
class Bar(Limit):
    """A limit for one ratio.

    Args:
        what: the ratio in words.
        over: engine, shape and mix of the ratio's numerator.
        under: engine, shape and mix of the ratio's denominator.
        most: as in ``Limit``.
        least: as in ``Limit``.
    """

    what: str
    over: tuple[str, str, str]
    under: tuple[str, str, str]


def _of_ours(what, shape, most, mix="4 adapters", base="base"):
    return Bar(what, (OURS, shape, mix), (OURS, shape, base), most=most)


def _of_stock(what, shape, mix, least):
    return Bar(what, (STOCK, shape, mix), (OURS, shape, mix), least=least)


MOST_PREFILL = round(1 + adapters_share(HIDDEN) + POINTS, 3)
BARS = (
    _of_ours("ours, prefill: 4 adapters over base", PREFILL, MOST_PREFILL),
    _of_ours("ours, decode of 8 rows: 4 adapters over base", DECODE_8, 1.10),
    _of_ours(
        "ours, decode: 16 adapters in 4 slots over base, 4 rows at a time",
        DECODE_16,
        1.08,
        "16 adapters",
        "base, 4 at a time",
    ),
    _of_stock("prefill, 4 adapters: stock over ours", PREFILL, "4 adapters", 4.5),
    _of_stock("prefill, base only: stock over ours", PREFILL, "base", 1.7),
    _of_stock("decode of 8 rows, 4 adapters: stock over ours", DECODE_8, "4 adapters", 1.7),
    _of_stock("decode of 1 row, 1 adapter: stock over ours", DECODE_1, "1 adapter", 2.0),
    _of_stock("decode of 1 row, base only: stock over ours", DECODE_1, "base", 2.0),
)


def summary(run):
    """Return each measure's median, and half its interquartile range relative to the median."""
    return medians(run["rounds"])


def costs(runs):
    """Return the median time for the ratios, by engine, shape and mix."""
    return {
        (run["engine"], run["workload"].shape, run["workload"].mix): summary(run)[
            run["workload"].judged
        ]["median"]
        for run in runs
    }


def ratios(runs):
    """Return each workload's ratios: to the workload without adapters, and of others to ours."""
    cost, rows = costs(runs), []
    for shape, mix in dict.fromkeys((shape, mix) for _, shape, mix in cost):
        pairs = {
            "ours: over base": ((OURS, shape, mix), (OURS, shape, "base")),
            "stock: over base": ((STOCK, shape, mix), (STOCK, shape, "base")),
            "stock over ours": ((STOCK, shape, mix), (OURS, shape, mix)),
            "before over ours": ((BEFORE, shape, mix), (OURS, shape, mix)),
        }
        if mix.startswith("base"):
            pairs = {name: pair for name, pair in pairs.items() if name.endswith("over ours")}
        rows.append(
            {
                "shape": shape,
                "mix": mix,
                **{
                    name: ratio(cost.get(over), cost.get(under))
                    for name, (over, under) in pairs.items()
                },
            }
        )
    return rows


def judged(runs, engines):
    """Return each bar with its ratio and whether it is reached, or None if it was not measured.

    Args:
        runs: the runs that ``Turns.run`` returned.
        engines: the facts about each engine, by name.
    """
    cost = costs(runs)
    rows = [
        judgement(bar.what, bar, ratio(cost.get(bar.over), cost.get(bar.under))) for bar in BARS
    ]
    over = [row["stock over ours"] for row in ratios(runs)]
    least = min((ratio for ratio in over if ratio is not None), default=None)
    rows.append(judgement("the least of all: stock over ours", Limit(least=1.0), least))
    ours, stock = engines.get(OURS, {}), engines.get(STOCK, {})
    for name, of in STARTS.items():
        rows.append(
            judgement(
                f"ours, first request over the tenth, {name} start",
                Limit(most=FIRST_OVER_TENTH),
                _first_over_tenth(of(ours)),
            )
        )
    for (name, of), most in zip(STARTS.items(), (COLD, WARM), strict=True):
        rows.append(
            judgement(
                f"{name} start, s: ours - stock",
                Limit(most=most),
                _difference(of(ours), of(stock)),
            )
        )
    rows.append(
        judgement(
            "ours, share of the linear layers that are fused",
            Limit(least=LEAST_FUSED),
            fused(ours.get("log", ())),
        )
    )
    return rows


def _first_over_tenth(start):
    first = start.get("first_requests")
    return first[0] / first[9] if first else None


def _difference(start, other):
    ours, stock = start.get("load_seconds"), other.get("load_seconds")
    return None if ours is None or stock is None else ours - stock


def fused(log):
    """Return the share of fused layers from the plug-in's summary in a log; None if it has none."""
    for line in log:
        counts = re.match(r"(\d+) of (\d+) linear layers fused", line)
        if counts:
            return int(counts[1]) / int(counts[2])
    return None


def not_judged(options):
    """Return why a run is not judged, or None."""
    if options.hidden != HIDDEN or options.layers not in LAYERS:
        return f"they are for hidden {HIDDEN} with {LAYERS[0]} to {LAYERS[-1]} layers"
    if options.rounds < ROUNDS:
        return f"they are for {ROUNDS} rounds or more"
    if options.max_loras != MAX_LORAS:
        return f"they are for {MAX_LORAS} slots"
    return None
