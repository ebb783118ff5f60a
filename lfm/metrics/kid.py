"""Kernel inception distance (KID): the squared maximum mean discrepancy of two feature sets (Binkowski et al. 2018).

    k(x, y) = (x . y / D + 1)^3
    KID = mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean over i, j of k(x_i, y_j)

x are real and y generated features of D dimensions. The estimate is unbiased: its expectation does not depend on the
number of features, and it is negative as often as positive if both sets come from the same distribution.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lfm.metrics.spread import Spread


def kid(real: Tensor, fake: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Spread:
    """Return the KID of features (N, D) and (M, D), averaged over random subsets.

    Sets that are not larger than `subset_size` are used whole; if both are, there is one subset.
    """
    size = min(subset_size, len(real), len(fake))
    if size == len(real) == len(fake):
        num_subsets = 1
    random = np.random.Generator(np.random.Philox(key=seed))

    def subset(features: Tensor) -> Tensor:
        return features[torch.from_numpy(random.permutation(len(features))[:size])]

    values = [squared_discrepancy(subset(real), subset(fake)) for _ in range(num_subsets)]
    return Spread(float(np.mean(values)), float(np.std(values)))


def squared_discrepancy(first: Tensor, second: Tensor) -> float:
    """Return the unbiased estimate above of all features (N, D) and (M, D)."""
    first, second = first.double(), second.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(first) + mean_of_pairs(second) - 2 * kernel(first, second).mean())
