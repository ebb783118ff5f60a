"""Minibatch optimal transport between data and noise (Pooladian et al. 2023; Tong et al. 2024).

Within a group of samples, the permutation p of least summed squared distance is chosen:

    p = argmin over permutations of sum_i |data_i - noise_p(i)|^2

It straightens the flow of an unconditional model. A conditional model would get a different noise distribution for each
condition, which sampling does not have (Cheng & Schwing 2025).
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def couple(data: Tensor, noise: Tensor, sample_numbers: Tensor, group: int) -> Tensor:
    """Return `noise` (B, ...) permuted within each `group` of successive sample numbers, as near to `data` as possible.

    Args:
        data: (B, ...).
        noise: (B, ...).
        sample_numbers: int64 (B,), in any order; they define the groups.
        group: samples per group; divides B. 1 leaves the noise as it is.
    """
    assert len(data) % group == 0, f"{len(data)} rows, groups of {group}"
    if group == 1:
        return noise
    coupled = torch.empty_like(noise)
    for rows in sample_numbers.argsort().split(group):
        # The squared norms do not depend on the permutation, so maximizing the products minimizes the distances.
        product = data[rows].flatten(1).double() @ noise[rows].flatten(1).double().T  # (group, group)
        _, partners = linear_sum_assignment(product.cpu(), maximize=True)
        coupled[rows] = noise[rows[torch.from_numpy(partners).to(rows.device)]]
    return coupled
