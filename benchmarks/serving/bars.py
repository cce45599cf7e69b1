"""Ratios of medians, and whether they reach the bars.

A bar that was not reached is missed, by however little. On another model than the bars name, or
with fewer rounds, nothing is judged.

Source: "Serving benchmark, hidden 2048, 4 adapters, medians of >= 5 interleaved runs" of the issue.
"""

import re
import statistics
from dataclasses import dataclass

from benchmarks.serving.rounds import BEFORE, OURS, STOCK

PREFILL, PREFILL_16 = "prefill, 8 x 64", "prefill, 16 x 32"
DECODE_1, DECODE_8, DECODE_16 = "decode, 1 row", "decode, 8 rows", "decode, 16 rows"
HIDDEN, LAYERS, MAX_LORAS, ROUNDS = 2048, range(4, 9), 4, 5
FIRST_OVER_TENTH = 1.5
LEAST_FUSED = 0.9  # of the linear layers


@dataclass(frozen=True)
class Bar:
    """What a ratio has to be.

    Args:
        what: in words.
        over: engine, shape and mix of the ratio's numerator.
        under: of its denominator.
        most: the ratio may be at most this, or None.
        least: the ratio must be at least this, or None.
    """

    what: str
    over: tuple[str, str, str]
    under: tuple[str, str, str]
    most: float | None = None
    least: float | None = None

    def reached(self, ratio):
        """Return whether a ratio reaches the bar; one that is no number does not."""
        if self.most is not None:
            return ratio <= self.most
        return ratio >= self.least

    @property
    def limit(self):
        """The bar as tables show it."""
        return f"<= {self.most}" if self.most is not None else f">= {self.least}"


def _of_ours(what, shape, most):
    return Bar(what, (OURS, shape, "4 adapters"), (OURS, shape, "base"), most=most)


def _of_stock(what, shape, mix, least):
    return Bar(what, (STOCK, shape, mix), (OURS, shape, mix), least=least)


BARS = (
    _of_ours("ours, prefill: 4 adapters over base", PREFILL, 1.15),
    _of_ours("ours, decode of 8 rows: 4 adapters over base", DECODE_8, 1.25),
    _of_stock("prefill, 4 adapters: stock over ours", PREFILL, "4 adapters", 3.0),
    _of_stock("decode of 8 rows, 4 adapters: stock over ours", DECODE_8, "4 adapters", 1.2),
    _of_stock("decode of 1 row, 1 adapter: stock over ours", DECODE_1, "1 adapter", 1.2),
    _of_stock("prefill, base only: stock over ours", PREFILL, "base", 1.1),
    _of_stock("decode of 8 rows, base only: stock over ours", DECODE_8, "base", 1.0),
    _of_stock("decode of 16 rows, base only: stock over ours", DECODE_16, "base", 1.0),
    _of_stock("decode of 1 row, base only: stock over ours", DECODE_1, "base", 1.3),
)


def summary(entry):
    """Return median and spread of each measure; the spread is half the quartiles' distance."""
    names = [name for name, value in entry["rounds"][0].items() if value is not None]
    return {name: _median([one[name] for one in entry["rounds"]]) for name in names}


def _median(values):
    middle = statistics.median(values)
    if len(values) < 2:
        return {"median": middle, "spread": None}
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": middle, "spread": (high - low) / 2 / middle}


def costs(found):
    """Return the median time that ratios are taken of, by engine, shape and mix."""
    return {
        (one["engine"], one["workload"].shape, one["workload"].mix): summary(one)[
            one["workload"].judged
        ]["median"]
        for one in found
    }


def ratios(found):
    """Return the ratios of each workload: over base, and of the others over ours."""
    cost, rows = costs(found), []
    for shape, mix in dict.fromkeys((shape, mix) for _, shape, mix in cost):
        pairs = {
            "ours: over base": ((OURS, shape, mix), (OURS, shape, "base")),
            "stock: over base": ((STOCK, shape, mix), (STOCK, shape, "base")),
            "stock over ours": ((STOCK, shape, mix), (OURS, shape, mix)),
            "before over ours": ((BEFORE, shape, mix), (OURS, shape, mix)),
        }
        if mix == "base":
            pairs = {name: pair for name, pair in pairs.items() if name.endswith("over ours")}
        rows.append(
            {
                "shape": shape,
                "mix": mix,
                **{
                    name: _ratio(cost.get(one), cost.get(two)) for name, (one, two) in pairs.items()
                },
            }
        )
    return rows


def judged(found, engines):
    """Return each bar with its ratio and whether it is reached, None where it was not measured.

    Args:
        found: what ``Turns.run`` returned.
        engines: what is known of each engine, by name.
    """
    cost, rows = costs(found), []
    for bar in BARS:
        ratio = _ratio(cost.get(bar.over), cost.get(bar.under))
        reached = None if ratio is None else bar.reached(ratio)
        rows.append({"bar": bar.what, "limit": bar.limit, "ratio": ratio, "reached": reached})
    first = engines.get(OURS, {}).get("first_requests")
    ratio = first[0] / first[9] if first else None
    rows.append(
        {
            "bar": "ours, first request over the tenth",
            "limit": f"<= {FIRST_OVER_TENTH}",
            "ratio": ratio,
            "reached": None if ratio is None else ratio <= FIRST_OVER_TENTH,
        }
    )
    share = fused(engines.get(OURS, {}).get("said", ()))
    rows.append(
        {
            "bar": "ours, share of the linear layers that are fused",
            "limit": f">= {LEAST_FUSED}",
            "ratio": share,
            "reached": None if share is None else share >= LEAST_FUSED,
        }
    )
    return rows


def fused(said):
    """Return the share of layers that our line of log counts as fused, or None without one."""
    for line in said:
        found = re.match(r"(\d+) of (\d+) linear layers fused", line)
        if found:
            return int(found[1]) / int(found[2])
    return None


def not_judged(options):
    """Return why the bars do not hold for a run, or None where they do."""
    if options.hidden != HIDDEN or options.layers not in LAYERS:
        return f"they are for hidden {HIDDEN} with {LAYERS[0]} to {LAYERS[-1]} layers"
    if options.rounds < ROUNDS:
        return f"they are for {ROUNDS} rounds or more"
    if options.max_loras != MAX_LORAS:
        return f"they are for {MAX_LORAS} slots"
    return None


def _ratio(one, other):
    return None if None in (one, other) else one / other
