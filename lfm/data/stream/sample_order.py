"""The order of samples: a pure function of (shard sizes, seed), for an endless stream of epochs.

The stream's position q is sample q mod N of epoch q div N. In every epoch the shards are permuted; consecutive shards
form a window; inside a window all samples are permuted. So a reader holds one window of shards, needs the next ones in a
known sequence, and finds any position by computing one epoch's shard permutation and one window: nothing else is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class Order:
    """Where each position of the stream lies.

    Args:
        shard_sizes: samples in each shard.
        seed: of the permutations.
        window: how many shards are shuffled together.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, window: int) -> None:
        self.shard_sizes = np.asarray(shard_sizes, np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        if self.num_samples == 0:
            raise ValueError("an order needs at least one sample")
        self.seed, self.window = seed, window
        # Two of each are in use while a batch crosses a border, and one more when it wraps round a small epoch.
        self._epoch = lru_cache(maxsize=3)(self._permute_shards)
        self._window = lru_cache(maxsize=3)(self._permute_window)

    def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row, int64 (count,) each, of `count` positions from `position` on."""
        shards, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        filled = 0
        while filled < count:
            epoch, window = self.window_at(position + filled)
            start = epoch * self.num_samples + (int(self._epoch(epoch)[1][window - 1]) if window else 0)
            window_shards, window_rows = self._window(epoch, window)
            taken = slice(position + filled - start, position + count - start)
            length = len(window_shards[taken])
            shards[filled : filled + length], rows[filled : filled + length] = window_shards[taken], window_rows[taken]
            filled += length
        return shards, rows

    def window_at(self, position: int) -> tuple[int, int]:
        """The epoch and the window of a position."""
        epoch, within = divmod(position, self.num_samples)
        return epoch, int(np.searchsorted(self._epoch(epoch)[1], within, side="right"))

    def next_use(self, position: int) -> np.ndarray:
        """For each shard, how many others come before it from the window of `position` on: int64 (shards,)."""
        epoch, window = self.window_at(position)
        permutation, following = self._epoch(epoch)[0][window * self.window :], self._epoch(epoch + 1)[0]
        uses = np.empty(len(following), np.int64)
        uses[following] = len(following) + np.arange(len(following))
        uses[permutation] = np.arange(len(permutation))
        return uses

    def upcoming_shards(self, position: int, count: int) -> list[int]:
        """The next `count` different shards that the stream needs from `position` on, in its own sequence."""
        sequence = np.argsort(self.next_use(position))
        return sequence[self.shard_sizes[sequence] > 0][:count].tolist()

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's sequence of shards, and the position within the epoch at which each window ends."""
        permutation = _random(self.seed, epoch).permutation(len(self.shard_sizes))
        starts = np.arange(0, len(permutation), self.window)
        return permutation, np.cumsum(np.add.reduceat(self.shard_sizes[permutation], starts))

    def _permute_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of every position of a window."""
        shards = self._epoch(epoch)[0][window * self.window : (window + 1) * self.window]
        sizes = self.shard_sizes[shards]
        rows = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        permutation = _random(self.seed, epoch, window).permutation(len(rows))
        return np.repeat(shards, sizes)[permutation], rows[permutation]


def _random(seed: int, *place: int) -> np.random.Generator:
    # As spawn_key: plain entropy is padded with zeros, so that (epoch,) and (epoch, 0) would be one and the same.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=place)))
