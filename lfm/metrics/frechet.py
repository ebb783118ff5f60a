"""The Frechet distance between two sets of features, each modelled as a Gaussian.

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2

m is the mean and S the covariance with 1 / (N - 1). With S1 = R R^T, the last trace is the sum of the square roots of the
eigenvalues of the symmetric matrix R^T S2 R. This avoids `scipy.linalg.sqrtm`, whose result depends on the version of
scipy and which fails for singular covariances (Dowson & Landau 1982; Heusel et al. 2017, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set of N features of D dimensions."""

    mean: Tensor  # float64 (D,)
    covariance: Tensor  # float64 (D, D), with 1 / (N - 1)
    count: int | None  # N; None for imported statistics, whose files do not record it


@dataclass(frozen=True)
class FeatureSums:
    """Sums of N features and of their outer products. Sums of disjoint sets are added with `+`."""

    count: int
    total: Tensor  # float64 (D,)
    products: Tensor  # float64 (D, D)

    @staticmethod
    def of(features: Tensor) -> FeatureSums:
        """Return the sums of features (N, D)."""
        features = features.double()
        return FeatureSums(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: FeatureSums) -> FeatureSums:
        return FeatureSums(self.count + other.count, self.total + other.total, self.products + other.products)

    def gaussian(self) -> Gaussian:
        """Return mean and covariance; the covariance of a single feature is zero."""
        mean = self.total / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / max(1, self.count - 1)
        return Gaussian(mean, covariance, self.count)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return the squared distance d^2, the quantity that FID reports. It is finite for singular covariances, too."""
    assert first.mean.shape == second.mean.shape, f"{tuple(first.mean.shape)}, {tuple(second.mean.shape)}"
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors * values.clamp(min=0).sqrt()
    mixed = torch.linalg.eigvalsh(root.T @ second.covariance @ root).clamp(min=0).sqrt().sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * mixed
    return float((first.mean - second.mean).square().sum() + spread)


def singular_warning(*gaussians: Gaussian) -> str | None:
    """Return a warning if a covariance is singular because there are fewer features than dimensions, else None."""
    counts = [gaussian.count for gaussian in gaussians if gaussian.count is not None]
    dimensions = len(gaussians[0].mean)
    if not counts or min(counts) > dimensions:
        return None
    return (
        f"{min(counts):,} images in {dimensions:,} dimensions: a covariance is singular and the Frechet distance is biased "
        "upwards; compare equal counts only, or use KID"
    )
