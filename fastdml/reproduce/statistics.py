"""Means over seeds, and the paired comparison of two trainings on the same seeds, in float64.

Student's t comes from its regularised incomplete beta function, so that no package is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

LEVEL = 0.95
NO_SPREAD = 1e-12  # of the values compared: differences no further apart than this are rounding
Number = float | None


class Spread(NamedTuple):
    """Of n values that are there: None where there are too few."""

    n: int
    mean: float | None
    sd: float | None  # of a sample (ddof 1): None below two values


class Difference(NamedTuple):
    """Of ours - baseline over the n seeds that have both."""

    n: int
    mean: float | None
    low: float | None  # the two-sided 95 % interval of the mean, by Student's t
    high: float | None
    p: float | None  # of the two-sided paired t-test: the mean difference is 0
    same: bool  # whether it is one difference in all of two or more seeds: then there is no test

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def present(values: Sequence[Number]) -> list[float]:
    """The values that are there: neither None nor NaN nor infinite."""
    return [float(v) for v in values if v is not None and math.isfinite(v)]


def spread(values: Sequence[Number]) -> Spread:
    found = present(values)
    n = len(found)
    if not n:
        return Spread(0, None, None)
    mean = math.fsum(found) / n
    if n < 2:
        return Spread(n, mean, None)
    return Spread(n, mean, math.sqrt(math.fsum((v - mean) ** 2 for v in found) / (n - 1)))


def pairs(baseline: Sequence[Number], ours: Sequence[Number]) -> list[float]:
    """ours - baseline of the seeds that have both, in their order. Raises ValueError for sequences
    that are not of the same seeds."""
    both = zip(baseline, ours, strict=True)
    found = [present(pair) for pair in both]
    return [pair[1] - pair[0] for pair in found if len(pair) == 2]


def difference(baseline: Sequence[Number], ours: Sequence[Number]) -> Difference:
    """ours - baseline, seed by seed. With one seed there is a mean and neither interval nor test;
    where all differences are the same there is no spread to test the mean against."""
    gaps = pairs(baseline, ours)
    n, mean, sd = spread(gaps)
    if mean is None or sd is None:
        return Difference(n, mean, None, None, None, False)
    largest = max(map(abs, present([*baseline, *ours])))
    if max(gaps) - min(gaps) <= NO_SPREAD * largest:
        return Difference(n, mean, None, None, None, True)
    error = sd / math.sqrt(n)
    half = t_quantile(n - 1) * error
    return Difference(n, mean, mean - half, mean + half, two_sided_p(mean / error, n - 1), False)


def two_sided_p(t: float, freedom: int) -> float:
    """P(|T| >= |t|) of Student's t with so many degrees of freedom."""
    if math.isinf(t):
        return 0.0
    square = t * t
    rest = square / (freedom + square)  # 1 - x, without the cancellation
    return _incomplete_beta(freedom / (freedom + square), rest, freedom / 2, 0.5)


@lru_cache
def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t that |T| stays below with probability `level`, by bisection."""
    low, high = 0.0, 1.0
    while two_sided_p(high, freedom) > 1 - level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, freedom) > 1 - level else (low, middle)
    return high


def _incomplete_beta(x: float, rest: float, a: float, b: float) -> float:
    """The regularised I_x(a, b), by the continued fraction of Numerical Recipes 6.4, which
    converges quickly below (a + 1) / (a + b + 2); above it the other tail is computed. rest: 1 - x,
    with all its digits where x is close to 1."""
    if x <= 0 or rest <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(rest, x, b, a)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(scale + a * math.log(x) + b * math.log(rest)) / a
    return front / _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """1 + d1 / (1 + d2 / (1 + ...)), by Lentz's method."""
    tiny = 1e-300
    value, c, d = 1.0, 1.0, 0.0
    for i in range(1, 1000):
        m = i // 2
        if i % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / ((1.0 + term * d) or tiny)
        c = (1.0 + term / c) or tiny
        value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return value
