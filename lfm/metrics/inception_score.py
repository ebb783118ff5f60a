"""The inception score of generated images (Salimans et al. 2016).

    inception score = exp(mean over images of KL(p(y | x) || p(y)))

p(y | x) are the class probabilities of an image, p(y) their mean over the images of a split.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from lfm.metrics.spread import Spread


def inception_score(probabilities: Iterable[Tensor], total: int, num_splits: int = 10) -> Spread:
    """Return the score of `total` images, split in their order into `num_splits` equal parts, or one per image.

    Args:
        probabilities: class probabilities (n, K), block by block in the order of the images.
        total: number of images in all blocks.
    """
    num_splits = min(num_splits, total)
    borders = list(pairwise(index * total // num_splits for index in range(num_splits + 1)))
    negative_entropy = torch.zeros(num_splits, dtype=torch.float64)
    sums: list[Tensor | float] = [0.0] * num_splits
    start = 0
    for block in probabilities:
        for split, (begin, end) in enumerate(borders):
            part = block[max(0, begin - start) : max(0, end - start)].double().cpu()
            negative_entropy[split] += torch.xlogy(part, part).sum()
            sums[split] = sums[split] + part.sum(0)
        start += len(block)
    scores = []
    for split, (begin, end) in enumerate(borders):
        mean = torch.as_tensor(sums[split]) / (end - begin)
        scores.append((negative_entropy[split] / (end - begin) - torch.xlogy(mean, mean).sum()).exp())
    values = torch.stack(scores)
    return Spread(float(values.mean()), float(values.std(correction=0)))
