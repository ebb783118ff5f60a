"""Fidelity and diversity of generated images, from nearest neighbours among features.

The manifold of a set is the union of balls around its features; the radius of each is the distance to its k-th nearest
neighbour within the set.

    precision = fraction of generated features inside the real manifold
    recall    = fraction of real features inside the generated manifold
    density   = mean over generated features of (number of real balls that contain it) / k
    coverage  = fraction of real balls that contain a generated feature

Precision and recall: Kynkaanniemi et al. 2019, k = 3. Density and coverage, which are robust to outliers: Naeem et al.
2020, k = 5.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_ROWS = 1024  # rows of the distance matrix in memory at once


def distances(first: Tensor, second: Tensor) -> Iterator[Tensor]:
    """Yield the Euclidean distances between `first` (N, D) and `second` (M, D) in blocks (B, M) of rows."""
    second = second.double()
    for rows in first.double().split(_BLOCK_ROWS):
        yield torch.cdist(rows, second)


def _radii(features: Tensor, k: int) -> Tensor:
    """Return the distance of each feature (N, D) to its k-th nearest neighbour, float64 (N,)."""
    k = min(k, len(features) - 1)
    return torch.cat([block.kthvalue(k + 1, dim=1).values for block in distances(features, features)])


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Return precision and recall of features (N, D) and (M, D)."""
    return _fraction_inside(fake, real, k), _fraction_inside(real, fake, k)


def _fraction_inside(points: Tensor, manifold: Tensor, k: int) -> float:
    radii = _radii(manifold, k)
    return float(torch.cat([(block <= radii).any(1) for block in distances(points, manifold)]).double().mean())


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Return density and coverage of features (N, D) and (M, D)."""
    radii = _radii(real, k)
    blocks = zip(distances(real, fake), radii.split(_BLOCK_ROWS), strict=True)
    inside = torch.cat([block < radius[:, None] for block, radius in blocks])
    return float(inside.sum() / (k * len(fake))), float(inside.any(1).double().mean())
