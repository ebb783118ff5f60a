"""What share of generated images looks real, and what share of the real ones is reached, by nearest neighbours.

A set's manifold is the union of balls round its features, each as wide as the distance to the k-th nearest of its own.

    precision = share of fakes inside the real manifold         recall = share of reals inside the fake one
    density = mean over fakes of (real balls that hold it) / k  coverage = share of real balls that hold a fake

Kynkaanniemi et al. 2019 (k = 3); Naeem et al. 2020 (k = 5), whose pair is not ruled by outliers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ROWS = 1024  # of the matrix of distances, held at once


def _distances(first: Tensor, second: Tensor) -> Iterator[Tensor]:
    """Euclidean distances, a block (B, M) of rows of `first` (N, D) after the other."""
    second = second.double()
    for rows in first.double().split(_ROWS):
        yield torch.cdist(rows, second)


def _radii(features: Tensor, k: int) -> Tensor:
    """The distance of each feature (N, D) to its k-th nearest neighbour, float64 (N,)."""
    k = min(k, len(features) - 1)
    return torch.cat([block.kthvalue(k + 1, dim=1).values for block in _distances(features, features)])


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall of features (N, D) and (M, D)."""
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


def _share_inside(points: Tensor, of: Tensor, k: int) -> float:
    radii = _radii(of, k)
    return float(torch.cat([(block <= radii).any(1) for block in _distances(points, of)]).double().mean())


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage of features (N, D) and (M, D)."""
    radii = _radii(real, k)
    blocks = zip(_distances(real, fake), radii.split(_ROWS), strict=True)
    inside = torch.cat([block < radius[:, None] for block, radius in blocks])
    return float(inside.sum() / (k * len(fake))), float(inside.any(1).double().mean())


def nearest(points: Tensor, of: Tensor) -> Tensor:
    """The row of the nearest of `of` (M, D) to each of `points` (N, D), int64 (N,)."""
    return torch.cat([block.argmin(1) for block in _distances(points, of)])
