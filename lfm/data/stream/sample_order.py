"""The order of samples: a pure function of (shard sizes, seed), for an endless stream of epochs.

Position q of the stream is sample q mod N of epoch q div N, of N samples. In every epoch the shards are permuted;
consecutive shards form a window; within a window all samples are permuted. A reader therefore keeps one window of shards
open, knows the sequence of the next ones, and finds any position from the epoch's shard permutation and one window's
sample permutation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class Order:
    """The shard and row of each position of the stream.

    Args:
        shard_sizes: samples in each shard.
        seed: seed of the permutations.
        window: number of shards that are shuffled together.
        stream: numbers that distinguish the permutations of several orders of one seed.
    """

    def __init__(
        self, shard_sizes: Sequence[int] | np.ndarray, seed: int, window: int, *, stream: tuple[int, ...] = ()
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        if self.num_samples == 0:
            raise ValueError("an order needs at least one sample")
        self.seed, self.window, self.stream = seed, window, stream
        # A batch that crosses a border uses two of each, and one more if it wraps round a small epoch.
        self._epoch = lru_cache(maxsize=3)(self._permute_shards)
        self._window = lru_cache(maxsize=3)(self._permute_window)

    def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shards and rows, int64 (count,) each, of `count` positions from `position` on."""
        shards, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        filled = 0
        while filled < count:
            epoch, window = self.window_at(position + filled)
            start = epoch * self.num_samples + (int(self._epoch(epoch)[1][window - 1]) if window else 0)
            window_shards, window_rows = self._window(epoch, window)
            part = slice(position + filled - start, position + count - start)
            end = filled + len(window_shards[part])
            shards[filled:end], rows[filled:end] = window_shards[part], window_rows[part]
            filled = end
        return shards, rows

    def window_at(self, position: int) -> tuple[int, int]:
        """Return the epoch of a position and its window within the epoch."""
        epoch, within = divmod(position, self.num_samples)
        return epoch, int(np.searchsorted(self._epoch(epoch)[1], within, side="right"))

    def upcoming_shards(self, position: int, count: int | None = None) -> list[int]:
        """Return the shards in the order of their next use, from the window of `position` on; all or the first `count`."""
        epoch = position // self.num_samples
        sequence = np.concatenate([self._shards_from(position), self._epoch(epoch + 1)[0]])
        sequence = sequence[np.sort(np.unique(sequence, return_index=True)[1])]  # each at its first place
        return sequence[self.shard_sizes[sequence] > 0][:count].tolist()

    def shards_of_pass(self, position: int, count: int | None = None) -> list[int]:
        """Return the shards as `upcoming_shards` does, but only those of the rest of the pass."""
        sequence = self._shards_from(position)
        return sequence[self.shard_sizes[sequence] > 0][:count].tolist()

    def _shards_from(self, position: int) -> np.ndarray:
        """Return an epoch's sequence of shards from the window of `position` on."""
        epoch, window = self.window_at(position)
        return self._epoch(epoch)[0][window * self.window :]

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's sequence of shards, and the position within the epoch at which each window ends."""
        permutation = _random(self.seed, *self.stream, epoch).permutation(len(self.shard_sizes))
        starts = np.arange(0, len(permutation), self.window)
        return permutation, np.cumsum(np.add.reduceat(self.shard_sizes[permutation], starts))

    def _permute_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Return shard and row of every position of a window."""
        shards = self._epoch(epoch)[0][window * self.window : (window + 1) * self.window]
        sizes = self.shard_sizes[shards]
        rows = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        permutation = _random(self.seed, *self.stream, epoch, window).permutation(len(rows))
        return np.repeat(shards, sizes)[permutation], rows[permutation]


def _random(seed: int, *place: int) -> np.random.Generator:
    # As spawn_key: plain entropy is padded with zeros, so that (epoch,) and (epoch, 0) would give the same numbers.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=place)))
