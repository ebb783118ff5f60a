"""How far two sets of trainings differ, and how soon one reaches what the other ends with.

    difference   d_k = b_k - a_k      of the final values of seed k
    p            two-sided, of the t test of d = 0: paired, t = mean(d) sqrt(n) / std(d) with n - 1 degrees of freedom;
                 Welch's for trainings of other seeds or data, whose values are not pairs
    reached at   the first x at which the curve, linear between its points, is as good as the target

Student 1908; Welch 1947. With few seeds the test is weak: three pairs have two degrees of freedom, and differences of about
twice their spread are needed for p = 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Difference:
    """The difference of a configuration's final values to those of the first configuration."""

    values: tuple[float, ...]  # one for each pair of seeds; empty if they are not pairs
    mean: float
    relative: float  # mean difference / mean of the first
    spread: float  # standard deviation of the differences; NaN for one seed
    p: float  # NaN for one seed
    num_better: int  # pairs in which this configuration is better


def difference(first: Sequence[float], other: Sequence[float], *, paired: bool, higher_is_better: bool) -> Difference:
    """Return the difference between the final values of two configurations, one value for each seed."""
    a, b = np.asarray(first, np.float64), np.asarray(other, np.float64)
    mean = float(b.mean() - a.mean())
    relative = mean / abs(a.mean()) if a.mean() else math.nan
    if not paired:
        spread = float(np.sqrt(a.var(ddof=1) + b.var(ddof=1))) if len(a) > 1 else math.nan
        return Difference((), mean, relative, spread, _p_value(a, b, paired=False), 0)
    pairs = b - a
    spread = float(pairs.std(ddof=1)) if len(pairs) > 1 else math.nan
    num_better = int(((pairs > 0) if higher_is_better else (pairs < 0)).sum())
    return Difference(tuple(pairs.tolist()), mean, relative, spread, _p_value(a, b, paired=True), num_better)


def _p_value(a: np.ndarray, b: np.ndarray, *, paired: bool) -> float:
    if len(a) < 2:
        return math.nan
    if paired and not (b - a).std(ddof=1):  # equal differences: the test statistic is 0/0 or infinite
        return 1.0 if np.array_equal(a, b) else 0.0
    return float((stats.ttest_rel(b, a) if paired else stats.ttest_ind(b, a, equal_var=False)).pvalue)


def reached_at(points: Sequence[tuple[float, float]], target: float, *, higher_is_better: bool) -> float | None:
    """Return the first x at which a curve is as good as `target`; None if it never is.

    Args:
        points: (x, y) by ascending x. A curve whose first point is good enough has reached the target at that x.
    """
    sign = -1.0 if higher_is_better else 1.0
    previous: tuple[float, float] | None = None
    for x, y in points:
        if sign * y <= sign * target:
            if previous is None or previous[1] == y:
                return x
            share = (previous[1] - target) / (previous[1] - y)
            return previous[0] + share * (x - previous[0])
        previous = (x, y)
    return None
