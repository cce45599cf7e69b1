"""Judge measured values by limits without a tolerance, and show the judgements in a table."""

from dataclasses import dataclass

from benchmarks.tables import markdown, number

__all__ = ["Limit", "judgement", "judgements_table", "missed"]

VERDICTS = {True: "reached", False: "**missed**", None: "not measured"}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The most or the least that a value may be.

    Args:
        most: the value may be at most this, or None.
        least: the value must be at least this, or None.
    """

    most: float | None = None
    least: float | None = None

    def reached(self, value):
        """Return whether a value keeps the limit; NaN does not."""
        if self.most is not None:
            return value <= self.most
        return value >= self.least

    @property
    def limit(self):
        """The limit, as text for tables."""
        return f"<= {self.most}" if self.most is not None else f">= {self.least}"


def judgement(name, limit, value):
    """Return a value with its limit, and whether it keeps the limit.

    Args:
        name: the value in words.
        limit: a ``Limit``.
        value: the value, or None if it was not measured.
    """
    reached = None if value is None else limit.reached(value)
    return {"bar": name, "limit": limit.limit, "ratio": value, "reached": reached}


def missed(judgements):
    """Return the judgements of values that do not keep their limits."""
    return [row for row in judgements if row["reached"] is False]


def judgements_table(judgements, not_judged):
    """Return judgements as a table.

    Args:
        judgements: returned by ``judgement``.
        not_judged: why the limits are not for this run, or None.
    """
    rows = []
    for row in judgements:
        verdict = VERDICTS[row["reached"]] if not_judged is None else "not judged"
        rows.append([row["bar"], row["limit"], number(row["ratio"]), verdict])
    table = markdown(["bar", "must be", "is", ""], rows)
    return table if not_judged is None else f"The bars are not judged: {not_judged}.\n\n{table}"
