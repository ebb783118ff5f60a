"""The Frechet distance of two sets of features, each taken for a Gaussian, from sums that can be added up in any order.

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2

m, the mean; S, the covariance with 1 / (N - 1). With S1 = R R^T the last trace is the sum of the roots of the eigenvalues
of R^T S2 R, which is symmetric: no square root of a matrix is taken, whose result would depend on the version of scipy
and which fails where a covariance is singular (Dowson & Landau 1982; Heusel et al. 2017, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """What the Frechet distance knows of a set."""

    mean: Tensor  # float64 (D,)
    covariance: Tensor  # float64 (D, D), with 1 / (N - 1)
    count: int | None  # N; None where it was imported from a file that does not tell


@dataclass(frozen=True)
class FeatureSums:
    """The sums of N features and of their products; those of the parts of a set add up to those of the set."""

    count: int
    total: Tensor  # float64 (D,)
    products: Tensor  # float64 (D, D)

    @staticmethod
    def of(features: Tensor) -> FeatureSums:
        """The sums of features (N, D)."""
        features = features.double()
        return FeatureSums(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: FeatureSums) -> FeatureSums:
        return FeatureSums(self.count + other.count, self.total + other.total, self.products + other.products)

    def gaussian(self) -> Gaussian:
        """Mean and covariance; of one feature alone the covariance is zero."""
        mean = self.total / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / max(1, self.count - 1)
        return Gaussian(mean, covariance, self.count)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """The squared distance d^2 above, which is what FID states; finite for singular covariances too."""
    assert first.mean.shape == second.mean.shape, f"{tuple(first.mean.shape)}, {tuple(second.mean.shape)}"
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors * values.clamp(min=0).sqrt()
    mixed = torch.linalg.eigvalsh(root.T @ second.covariance @ root).clamp(min=0).sqrt().sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * mixed
    return float((first.mean - second.mean).square().sum() + spread)


def singular_warning(*gaussians: Gaussian) -> str | None:
    """In words, what to think of a distance between Gaussians of too few features; None where there are enough."""
    counts = [gaussian.count for gaussian in gaussians if gaussian.count is not None]
    dimensions = len(gaussians[0].mean)
    if not counts or min(counts) > dimensions:
        return None
    return (
        f"{min(counts):,} images in {dimensions:,} dimensions: a covariance is singular and the Frechet distance biased "
        "upwards; compare equal counts only, or take KID"
    )
