"""Agreement of a segmenter's prediction on generated images with the segmentation maps that they were generated from.

IoU of a class = pixels of the class in both maps / pixels of the class in either map
mIoU = mean over the classes that occur
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Confusion:
    """Numbers of pixels by true class (rows) and predicted class (columns). Those of disjoint sets are added with `+`."""

    pixels: Tensor  # int64 (K, K)

    @staticmethod
    def of(predicted: Tensor, true: Tensor, num_labels: int) -> Confusion:
        """Count the pixels of maps (B, H, W), without those whose true class is outside 0 to num_labels - 1."""
        known = (true >= 0) & (true < num_labels)
        pairs = true[known].long() * num_labels + predicted[known].long().clamp(0, num_labels - 1)
        return Confusion(torch.bincount(pairs, minlength=num_labels**2).reshape(num_labels, num_labels))

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(self.pixels + other.pixels)

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes that occur in a true or a predicted map."""
        both = self.pixels.diagonal().double()
        either = self.pixels.sum(0) + self.pixels.sum(1) - both
        return float((both / either)[either > 0].mean())

    @property
    def pixel_accuracy(self) -> float:
        """Fraction of pixels whose class is predicted correctly."""
        return float(self.pixels.trace() / self.pixels.sum())
