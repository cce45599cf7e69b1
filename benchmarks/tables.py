"""Write tables in Markdown, and the numbers in them."""

__all__ = ["markdown", "number", "with_spread"]


def markdown(head, rows):
    """Return a table.

    Args:
        head: the titles of the columns.
        rows: the cells of each row, as text.

    Example:
        >>> print(markdown(["bar", "is"], [["step", "1.1"]]))
        | bar | is |
        |---|---|
        | step | 1.1 |
    """
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def number(value, digits=2):
    """Return a number as text; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def with_spread(measure, factor, digits):
    """Return a median and its spread as text; "-" for None.

    Args:
        measure: returned by ``median_and_spread``, or None.
        factor: the unit of the text per unit of the measure.
        digits: the digits after the point.

    Example:
        >>> with_spread({"median": 0.5, "spread": 0.02}, 1e3, 1)
        '500.0 ±2 %'
    """
    if measure is None:
        return "-"
    spread = "" if measure["spread"] is None else f" ±{100 * measure['spread']:.0f} %"
    return number(factor * measure["median"], digits) + spread
