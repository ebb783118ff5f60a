"""The result of a metric that is estimated several times."""

from __future__ import annotations

from typing import NamedTuple


class Spread(NamedTuple):
    """Mean and standard deviation of the estimates of a metric, over subsets or splits of the features."""

    mean: float
    deviation: float
