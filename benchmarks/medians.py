"""Compute medians with their spread, and ratios."""

import statistics

__all__ = ["median_and_spread", "medians", "ratio"]


def median_and_spread(values):
    """Return the median, and half the interquartile range relative to the median.

    Example:
        >>> median_and_spread([1.0, 2.0, 3.0])
        {'median': 2.0, 'spread': 0.5}
    """
    middle = statistics.median(values)
    if len(values) < 2:
        return {"median": middle, "spread": None}
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": middle, "spread": (high - low) / 2 / middle}


def medians(rounds):
    """Return the median and the spread of each measure.

    Args:
        rounds: the measures of each round, by name; a measure that is None is left out.
    """
    names = [name for name, value in rounds[0].items() if value is not None]
    return {name: median_and_spread([measures[name] for measures in rounds]) for name in names}


def ratio(numerator, denominator):
    """Return a ratio; None where a side of it was not measured."""
    return None if None in (numerator, denominator) else numerator / denominator
