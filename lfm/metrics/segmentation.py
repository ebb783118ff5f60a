"""How much of a map a segmenter finds again in the images that were made of it.

IoU of a class = pixels that are it in both / pixels that are it in either        mIoU = mean over the classes that occur
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Confusion:
    """Pixels by true class (rows) and found class (columns); those of the parts of a set add up."""

    pixels: Tensor  # int64 (K, K)

    @staticmethod
    def of(found: Tensor, true: Tensor, num_labels: int) -> Confusion:
        """Count the pixels of maps (B, H, W); where `true` is no class 0 to num_labels - 1 they do not count."""
        known = (true >= 0) & (true < num_labels)
        pairs = true[known].long() * num_labels + found[known].long().clamp(0, num_labels - 1)
        return Confusion(torch.bincount(pairs, minlength=num_labels**2).reshape(num_labels, num_labels))

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(self.pixels + other.pixels)

    @property
    def mean_iou(self) -> float:
        """Over the classes that are in a true or found map."""
        both = self.pixels.diagonal().double()
        either = self.pixels.sum(0) + self.pixels.sum(1) - both
        return float((both / either)[either > 0].mean())

    @property
    def pixel_accuracy(self) -> float:
        """The share of pixels whose class was found."""
        return float(self.pixels.trace() / self.pixels.sum())
