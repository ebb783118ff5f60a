"""Shares that hold exactly at every sample: a pure function of the weights.

Of the first n samples, source i has c_i(n) = n w_i, up to rounding. Rounding must not take back what it gave, so sources are
divided in two again and again: at a node of the tree, of n samples

    left(n) = floor(n w_left / (w_left + w_right) + 1/2),    right(n) = n - left(n)

and both never fall as n grows. The sample n belongs to the source whose count grows from n to n + 1. Nothing drifts: a count is
off by less than one sample for up to three sources at any n, and by less than (1 + depth of the tree) / 2 for more.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_LARGEST_SUM = 2**30  # of integer weights, so that products of two of them fit int64


class Shares:
    """The number of samples of each source among the first n.

    Args:
        weights: relative weights, not negative, with a positive sum.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        self.weights = _integers(weights)
        # As in Huffman's code, the two lightest nodes are joined first, so that heavy sources are rounded least often.
        heap: list[tuple[int, int, int | tuple]] = [
            (weight, leaf, leaf) for leaf, weight in enumerate(self.weights) if weight
        ]
        heapq.heapify(heap)
        while len(heap) > 1:
            (first, _, left), (second, number, right) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (first + second, len(self.weights) + number, (left, right, first, first + second)))
        self._root = heap[0][2]

    def counts(self, numbers: np.ndarray) -> np.ndarray:
        """Return the samples of each source among the first n, int64 (sources, len(numbers)), for each n of `numbers`."""
        counts = np.zeros((len(self.weights), len(numbers)), np.int64)
        self._fill(self._root, numbers, counts)
        return counts

    def _fill(self, node: int | tuple, numbers: np.ndarray, counts: np.ndarray) -> None:
        if isinstance(node, int):
            counts[node] = numbers
            return
        left, right, weight, total = node
        of_left = _of_left(numbers, weight, total)
        self._fill(left, of_left, counts)
        self._fill(right, numbers - of_left, counts)

    def places(self, first: int, num: int) -> tuple[np.ndarray, np.ndarray]:
        """Return for `num` samples from `first` on their sources, and their numbers among the samples of these sources.

        Equal to what `counts` gives, int64 (num,) each, in a time that grows with the depth of the tree and not with the
        number of sources.
        """
        sources, numbers = np.empty(num, np.int64), np.empty(num, np.int64)
        pending = [(self._root, np.arange(num), np.arange(first, first + num))]
        while pending:
            node, samples, before = pending.pop()
            if isinstance(node, int):
                sources[samples], numbers[samples] = node, before
                continue
            left, right, weight, total = node
            of_left = _of_left(before, weight, total)
            is_left = _of_left(before + 1, weight, total) > of_left
            if is_left.any():
                pending.append((left, samples[is_left], of_left[is_left]))
            if not is_left.all():
                pending.append((right, samples[~is_left], (before - of_left)[~is_left]))
        return sources, numbers


def _of_left(numbers: np.ndarray, weight: int, total: int) -> np.ndarray:
    """Return how many of the first n samples at a node its left side has."""
    whole, rest = np.divmod(numbers, total)
    return whole * weight + (2 * rest * weight + total) // (2 * total)


def _integers(weights: Sequence[Fraction]) -> list[int]:
    """Return integers in the proportion of the weights; rounded to about 10 digits if they would be too large."""
    total = sum(weights, Fraction(0))
    assert total > 0 and min(weights) >= 0, "weights are not negative, and one is positive"
    shares = [weight / total for weight in weights]
    common = math.lcm(*(share.denominator for share in shares))
    if common > _LARGEST_SUM:
        return [max(1, round(share * (_LARGEST_SUM - len(shares)))) if share else 0 for share in shares]
    return [int(share * common) for share in shares]
