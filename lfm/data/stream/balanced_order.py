"""The order of a source whose classes are balanced: a pure function of (shard sizes, classes, power, seed).

A class of n samples has the share n^(1 - power) of the samples: power 0 is the data as they are, 1 is all classes alike. Shares
hold exactly (`lfm.data.stream.shares`), and the k-th sample of a class is the k-th of the class's own order, in which each of
its samples comes once before any comes again. Classes go through the shards at speeds of their own, so all shards of the source
are open at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction

import numpy as np

from lfm.data.stream.sample_order import Order
from lfm.data.stream.shares import Shares

_DIGITS = 15  # of a class's weight
_AHEAD = 4096  # samples whose shards are opened first


@dataclass(frozen=True, eq=False)
class Balance:
    """The classes of a source's samples, and the power that they are balanced with.

    Attributes:
        codes: uint16 or int32 (samples,), the class of each sample that is read, one shard after the other.
        counts: int64 (shards,), samples of each shard in `codes`.
        power: above 0, up to 1.
    """

    codes: np.ndarray
    counts: np.ndarray
    power: float

    def of_shards(self, part: slice) -> Balance:
        """Return the same for a contiguous part of the shards."""
        first, num = int(self.counts[: part.start or 0].sum()), int(self.counts[part].sum())
        return Balance(self.codes[first : first + num], self.counts[part], self.power)

    @staticmethod
    def join(parts: Sequence[Balance]) -> Balance:
        """Return the balance of the samples in the shards of all parts, one part after the other."""
        codes, counts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "counts"))
        return Balance(codes, counts, parts[0].power)

    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the classes that have samples, ascending, and how many: int64 (classes,) each."""
        counts = np.bincount(self.codes)
        present = np.flatnonzero(counts)
        return present, counts[present]

    def shares(self) -> Shares:
        """Return the shares of `classes`."""
        return Shares(class_weights(self.classes()[1].tolist(), self.power))


def class_weights(counts: Sequence[int], power: float) -> list[Fraction]:
    """Return the weights count^(1 - power), to 15 digits and the same on every machine."""
    with localcontext(Context(prec=_DIGITS)):  # a float's power may differ in its last bit between machines
        return [Fraction(Decimal(count) ** (1 - Decimal(str(power)))) for count in counts]


class BalancedOrder:
    """The shard and row of each position of a source whose classes are balanced.

    Args:
        shard_sizes: samples in each shard; a shard to leave out has 0, and the shares of classes stay as they are with it.
        seed, window, stream: of `Order`; the window is that of each class.
        balance: classes of the samples.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | np.ndarray,
        seed: int,
        window: int,
        balance: Balance,
        *,
        stream: tuple[int, ...] = (),
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, np.int64)
        classes, counts = balance.classes()
        self._rows, pairs = _by_class(balance, classes, counts)
        weights = class_weights(counts.tolist(), balance.power)
        self._classes: list[tuple[Order, np.ndarray, np.ndarray]] = []  # order, shards and first places in `_rows`
        left_out = []
        for number, of_class in enumerate(np.split(pairs, np.searchsorted(pairs[:, 0], np.arange(1, len(classes))))):
            shards, sizes, firsts = of_class[:, 1], of_class[:, 2], of_class[:, 3]
            sizes = np.where(self.shard_sizes[shards] > 0, sizes, 0)
            if not sizes.any():
                left_out.append(number)
                sizes = of_class[:, 2]
            order = Order(sizes, seed, window, stream=(*stream, int(classes[number])))
            self._classes.append((order, shards, firsts))
        self._shares = Shares([Fraction(0) if number in left_out else weight for number, weight in enumerate(weights)])

    def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shards and rows, int64 (count,) each, of `count` positions from `position` on."""
        shards, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        classes, numbers = self._shares.places(position, count)
        by_class = np.argsort(classes, kind="stable")
        present, starts = np.unique(classes[by_class], return_index=True)
        for number, samples in zip(present.tolist(), np.split(by_class, starts[1:]), strict=False):
            order, of_class, firsts = self._classes[number]
            parts, places = order.at(int(numbers[samples[0]]), len(samples))
            shards[samples], rows[samples] = of_class[parts], self._rows[firsts[parts] + places]
        return shards, rows

    def window_at(self, position: int) -> tuple[int, int]:
        """Return (0, 0): all shards are one window, at any position."""
        del position
        return 0, 0

    def upcoming_shards(self, position: int, count: int | None = None) -> list[int]:
        """Return all shards, whatever `count` is, those of the next samples first."""
        del count
        soon, places = np.unique(self.at(position, _AHEAD)[0], return_index=True)
        later = np.setdiff1d(np.flatnonzero(self.shard_sizes), soon)
        return np.concatenate([soon[np.argsort(places)], later]).tolist()


def _by_class(balance: Balance, classes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the samples, one class after the other, and of each class in each shard where its rows are.

    Returns:
        rows, uint16 or int32 (samples,), of a class those of one shard after the other, ascending; and the places, int64
        (pairs, 4): number of the class in `classes`, shard, rows, and place of the first row.
    """
    large = int(balance.counts.max(initial=0)) > 2**16
    rows = np.empty(len(balance.codes), np.int32 if large else np.uint16)
    filled = np.cumsum(counts) - counts  # the next free place of each class
    pairs = []
    start = 0
    for shard, size in enumerate(balance.counts.tolist()):
        codes = balance.codes[start : start + size]
        start += size
        by_class = np.argsort(codes, kind="stable")
        present, firsts, sizes = np.unique(codes[by_class], return_index=True, return_counts=True)
        numbers = np.searchsorted(classes, present)
        rows[np.repeat(filled[numbers] - firsts, sizes) + np.arange(size)] = by_class
        pairs.append(np.stack([numbers, np.full(len(numbers), shard), sizes, filled[numbers]], axis=1))
        filled[numbers] += sizes
    places = np.concatenate(pairs)
    return rows, places[np.lexsort((places[:, 1], places[:, 0]))]
