"""KID, the kernel inception distance: the squared maximum mean discrepancy of two sets of features (Binkowski et al. 2018).

    k(x, y) = (x . y / D + 1)^3
    KID = mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean over i, j of k(x_i, y_j)

x, real features and y, generated ones, of D dimensions. It is unbiased: its expectation does not depend on N, and it is as
often below zero as above where both sets come from one distribution.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Kid(NamedTuple):
    """The mean over subsets, and the deviation of one of them."""

    mean: float
    deviation: float


def kid(real: Tensor, fake: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Kid:
    """KID of features (N, D) and (M, D); sets smaller than a subset are taken whole, once."""
    size = min(subset_size, len(real), len(fake))
    if size == len(real) == len(fake):
        num_subsets = 1
    random = np.random.Generator(np.random.Philox(key=seed))
    values = [
        squared_discrepancy(*(part[torch.from_numpy(random.permutation(len(part))[:size])] for part in (real, fake)))
        for _ in range(num_subsets)
    ]
    return Kid(float(np.mean(values)), float(np.std(values)))


def squared_discrepancy(first: Tensor, second: Tensor) -> float:
    """The formula above, of all features (N, D) and (M, D)."""
    first, second = first.double(), second.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(first) + mean_of_pairs(second) - 2 * kernel(first, second).mean())
