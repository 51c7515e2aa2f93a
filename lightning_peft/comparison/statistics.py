"""Means over seeds, their spread, and intervals that overlap or do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class Spread:
    """A metric over the seeds of a cell."""

    values: tuple[float, ...]
    mean: float
    deviation: float | None
    """The sample's standard deviation, with n - 1; none of one value."""
    interval: tuple[float, float] | None
    """Student's t-interval of the mean at 95 %, which takes the values for normally distributed; none of one value."""


def spread(values: Sequence[float]) -> Spread:
    """Return mean, standard deviation and interval of one or more values."""
    mean, n = fmean(values), len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return Spread(tuple(values), mean, None, None)
    deviation = stdev(values)
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return Spread(tuple(values), mean, deviation, (mean - half, mean + half))


def overlap(first: Spread, second: Spread) -> bool | None:
    """Whether two intervals overlap; nothing if one of them is none.

    Intervals that do not overlap differ more than a test at the same level would ask for; those that do overlap may
    still belong to different means.
    """
    if first.interval is None or second.interval is None:
        return None
    return first.interval[0] <= second.interval[1] and second.interval[0] <= first.interval[1]


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """Return t such that Student's distribution has the probability ``level`` between -t and t.

    Args:
        degrees: Degrees of freedom, at least 1.
        level: Of both sides together.
    """
    low, high = 0.0, 1.0
    while _between(high, degrees) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _between(middle, degrees) < level else (low, middle)
    return high


def _between(t: float, degrees: int) -> float:
    """Return the probability between -t and t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
