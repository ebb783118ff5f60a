"""Assignment of noise to data, which straightens the flow.

Minibatch optimal transport (Pooladian et al. 2023; Tong et al. 2024): within a group of samples, the permutation p of least
summed squared distance is chosen:

    p = argmin over permutations of sum_i |data_i - noise_p(i)|^2

It is for an unconditional model. A conditional model would get a different noise distribution for each condition, which
sampling does not have (Cheng & Schwing 2025).

Nearest of k (Li et al. 2025, arXiv 2505.18521): of k independent noises, each sample takes the nearest one by itself:

    noise = argmin over j < k of |data - noise_j|^2

It depends on no other sample and costs k draws. The noise of a sample is then not quite standard normal, which sampling
assumes: the difference grows with k and falls with the number of dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable

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


def nearest(data: Tensor, noise: Tensor, candidates: Iterable[Tensor]) -> Tensor:
    """Return the nearest to `data` of `noise` and `candidates` for each sample, all (B, ...); of equal distances the first."""
    distance = _squared_distance(data, noise)  # (B,)
    for candidate in candidates:
        other = _squared_distance(data, candidate)  # (B,)
        is_nearer = other < distance
        distance = torch.where(is_nearer, other, distance)
        noise = torch.where(is_nearer.view(-1, *[1] * (noise.ndim - 1)), candidate, noise)
    return noise


def _squared_distance(data: Tensor, noise: Tensor) -> Tensor:
    return (data - noise).square().flatten(1).sum(1)  # (B,)
