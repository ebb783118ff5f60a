"""Memorisation: whether generated images are copies of training samples.

d_1(x) <= d_2(x) <= ... are the distances of x to its nearest training samples y, in one of two spaces:

    features   d(x, y) = |f(x) - f(y)|                        of the features f of the decoded latents
    latents    d(x, y) = |x - y| / sqrt(number of values)     of scaled latents; of y, the mean of its posterior

Where a sample is trained on with its mirror image, the distance to it is the smaller of the two.

    threshold    the 1 % quantile of d_1 over held-back images, which the model was not trained on
    memorised    the share of generated images with d_1 < threshold; 1 % if they are as new as the held-back ones
    ratio        the mean of d_1 / d_2; near 0 if images are copies of single training samples, near 1 if they are new

Held-back images as a yardstick: Meehan, Chaudhuri and Dasgupta 2020. The ratio is scale-free as that of Carlini et al. 2023,
who divide d_1 by half of the mean of d_1, ..., d_50; Yoon et al. 2023 divide by d_2 alone and call an image memorised if the
ratio is below 1/3. A ratio says nothing where the training set holds duplicates, and the threshold does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lfm.metrics.precision_recall import distances

QUANTILE = 0.01
SMALL_RATIO = 1 / 3
NUM_NEAREST = 2  # the nearest training samples of an image that its measures need


@dataclass(frozen=True)
class NearestSamples:
    """The nearest of some samples for each of N points, the nearest first."""

    distances: Tensor  # float64 (N, k), ascending; infinite where there are fewer than k samples
    rows: Tensor  # int64 (N, k), numbers of the samples; -1 where there are fewer

    @staticmethod
    def none(count: int, k: int = NUM_NEAREST) -> NearestSamples:
        """Return the nearest of no samples, for `count` points."""
        return NearestSamples(
            torch.full((count, k), torch.inf, dtype=torch.float64), torch.full((count, k), -1, dtype=torch.int64)
        )

    @staticmethod
    def join(parts: Sequence[NearestSamples]) -> NearestSamples:
        """Return the nearest samples of the points of all parts, in their order."""
        return NearestSamples(torch.cat([part.distances for part in parts]), torch.cat([part.rows for part in parts]))

    def merge(self, other: NearestSamples) -> NearestSamples:
        """Return the nearest of both sets of samples; of samples at equal distance, those of `self` come first."""
        joined = torch.cat([self.distances, other.distances], 1)
        order = joined.argsort(dim=1, stable=True)[:, : self.distances.shape[1]]
        return NearestSamples(joined.gather(1, order), torch.cat([self.rows, other.rows], 1).gather(1, order))


def nearest_samples(
    points: Tensor, views: Sequence[Tensor], first_row: int = 0, k: int = NUM_NEAREST, scale: float = 1.0
) -> NearestSamples:
    """Return the nearest samples of points.

    Args:
        points: float (N, D).
        views: the samples in one or more views, such as the image and its mirror image, each float (M, D) on the device of
            the points; the distance to a sample is the smallest of those to its views.
        first_row: number of the first sample; the others follow it.
        k: number of samples for each point.
        scale: factor of the distances.
    """
    blocks = []
    for of_views in zip(*(distances(points, view) for view in views), strict=True):
        block = of_views[0]
        for other in of_views[1:]:
            block = torch.minimum(block, other)
        blocks.append(block.topk(min(k, block.shape[1]), largest=False))
    values = torch.cat([block.values for block in blocks]).cpu() * scale
    rows = torch.cat([block.indices for block in blocks]).cpu() + first_row
    return NearestSamples.none(len(points), k).merge(NearestSamples(values, rows))


@dataclass(frozen=True)
class Memorisation:
    """How near generated images are to training samples in one space, compared with held-back images."""

    threshold: float
    memorised: float  # share of generated images in [0, 1]
    ratio: float  # mean of d_1 / d_2 over generated images, in [0, 1]
    small_ratio: float  # share of generated images whose ratio is below 1/3
    nearest: float  # median of d_1 over generated images
    held_back_ratio: float  # mean over held-back images
    held_back_nearest: float  # median over held-back images

    @staticmethod
    def of(generated: NearestSamples, held_back: NearestSamples) -> Memorisation:
        """Return the measures from the nearest training samples of generated and of held-back images, at least one each."""
        threshold = float(held_back.distances[:, 0].quantile(QUANTILE))
        ratios = _ratios(generated)
        return Memorisation(
            threshold=threshold,
            memorised=_share(generated.distances[:, 0] < threshold),
            ratio=float(ratios.mean()),
            small_ratio=_share(ratios < SMALL_RATIO),
            nearest=float(generated.distances[:, 0].quantile(0.5)),
            held_back_ratio=float(_ratios(held_back).mean()),
            held_back_nearest=float(held_back.distances[:, 0].quantile(0.5)),
        )


def _ratios(nearest: NearestSamples) -> Tensor:
    """Return d_1 / d_2, float64 (N,); 1 where both are 0."""
    first, second = nearest.distances[:, 0], nearest.distances[:, 1]
    return torch.where(second > 0, first / second, 1.0)


def _share(condition: Tensor) -> float:
    return float(condition.double().mean())
