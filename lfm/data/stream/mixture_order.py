"""The order of samples of a mixture: a pure function of (shard sizes, weights, seed), like the order of each source.

The sample n belongs to the source whose share (`lfm.data.stream.shares`) grows from n to n + 1, and is the c_i(n)-th of that
source's own order, in which every sample comes once before any comes again. A stage begins with the counts at which the one
before it ended, so any position is found from one sum over the stages.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from lfm.data.columns.selection import Selection
from lfm.data.stream.balanced_order import Balance, BalancedOrder
from lfm.data.stream.sample_order import Order
from lfm.data.stream.shares import Shares


@dataclass(frozen=True)
class Stage:
    """The weights of the sources from one sample of the global order on."""

    first_sample: int
    weights: tuple[Fraction, ...]  # relative, one for each source; 0 leaves a source out


class StagedShares:
    """The number of samples of each source among the first n, with weights that change.

    Args:
        stages: the first begins at sample 0, each later one after the one before it.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        assert stages[0].first_sample == 0, "the first stage begins at the first sample"
        self.starts = np.array([stage.first_sample for stage in stages])
        self.shares = [Shares(stage.weights) for stage in stages]
        self._counts_before = [np.zeros(len(stages[0].weights), np.int64)]  # of each source at the start of each stage
        for shares, length in zip(self.shares, np.diff(self.starts), strict=False):
            self._counts_before.append(self._counts_before[-1] + shares.counts(np.array([length]))[:, 0])

    def counts(self, first: int, num: int = 1) -> np.ndarray:
        """Return the samples of each source among the first n, int64 (sources, num), for n from `first` on."""
        numbers = np.arange(first, first + num)
        stages = np.searchsorted(self.starts, numbers, side="right") - 1
        parts = [
            self._counts_before[stage][:, None]
            + self.shares[stage].counts(numbers[stages == stage] - self.starts[stage])
            for stage in range(stages[0], stages[-1] + 1)
        ]
        return np.concatenate(parts, axis=1)

    def weights_at(self, position: int) -> list[int]:
        """Return the relative weights of the sources at a position."""
        return self.shares[int(np.searchsorted(self.starts, position, side="right")) - 1].weights


class SourceOrder(Protocol):
    """The order of one source; see `Order`."""

    shard_sizes: np.ndarray

    def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shards and rows."""

    def window_at(self, position: int) -> Hashable:
        """Return what changes when other shards are needed."""

    def upcoming_shards(self, position: int, count: int | None = None) -> list[int]:
        """Return the shards in the order of their next use."""


class MixtureOrder:
    """The shard and row of each position of a mixture; the shards of all sources are numbered one after the other.

    Args:
        shard_sizes: samples in each shard, for each source.
        stages: of `StagedShares`.
        seed: seed of all permutations. One source has the order that `Order` gives it with this seed.
        window: number of shards of each source that are shuffled together.
        selections: the samples of each source that `shard_sizes` counts, where they are not all; None for all.
        balances: how the classes of each source are balanced; None where they are not.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int] | np.ndarray],
        stages: Sequence[Stage],
        seed: int,
        window: int,
        selections: Sequence[Selection | None] = (),
        balances: Sequence[Balance | None] = (),
    ) -> None:
        self.window = window
        self.selections = list(selections) or [None] * len(shard_sizes)
        self.orders: list[SourceOrder] = []
        for source, (sizes, balance) in enumerate(zip(shard_sizes, balances or [None] * len(shard_sizes), strict=True)):
            stream = (source,) if len(shard_sizes) > 1 else ()
            if balance is None:
                self.orders.append(Order(sizes, seed, window, stream=stream))
            else:
                self.orders.append(BalancedOrder(sizes, seed, window, balance, stream=stream))
        self.first_shards = np.cumsum([0, *map(len, shard_sizes)])  # number of each source's first shard
        self.shares = StagedShares(stages)

    def replace_order(self, source: int, order: SourceOrder) -> None:
        """Give a source another order, whose rows are those of the shards, also where samples are selected."""
        self.orders[source], self.selections[source] = order, None

    def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shards and rows, int64 (count,) each, of `count` positions from `position` on."""
        if len(self.orders) == 1:
            return self._at(0, position, count)
        shards, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        counts = self.shares.counts(position, count + 1)
        source = np.argmax(np.diff(counts), axis=0)
        for index in range(len(self.orders)):
            start, end = int(counts[index, 0]), int(counts[index, -1])
            if end > start:
                of_source = source == index
                shards[of_source], rows[of_source] = self._at(index, start, end - start)
                shards[of_source] += self.first_shards[index]
        return shards, rows

    def _at(self, source: int, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shards and rows of positions of a source's own order."""
        shards, rows = self.orders[source].at(position, count)
        selection = self.selections[source]
        return shards, rows if selection is None else selection.rows_at(shards, rows)

    def window_at(self, position: int) -> tuple[Hashable, ...]:
        """Return for each source what changes when other shards are needed: its epoch and the window within it."""
        counts = self.shares.counts(position)[:, 0].tolist()
        return tuple(order.window_at(count) for order, count in zip(self.orders, counts, strict=True))

    def upcoming_shards(self, position: int, windows: int | None = None) -> list[int]:
        """Return the shards, those of the next use first: all, or those of the first `windows` windows of each source."""
        counts, weights = self.shares.counts(position)[:, 0].tolist(), self.shares.weights_at(position)
        keyed: list[tuple[float, int]] = []
        for index, (order, count, weight) in enumerate(zip(self.orders, counts, weights, strict=True)):
            upcoming = order.upcoming_shards(count, None if windows is None else windows * self.window)
            before = (
                np.cumsum([0, *order.shard_sizes[upcoming[:-1]]]) / weight if weight else np.full(len(upcoming), np.inf)
            )
            keyed += zip(
                before.tolist(), (self.first_shards[index] + np.asarray(upcoming, np.int64)).tolist(), strict=True
            )
        return [shard for _, shard in sorted(keyed, key=lambda pair: pair[0])]  # by samples until then, of the mixture
